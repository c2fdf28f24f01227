"""Importance corrections: weights for tokens or sequences with different probabilities in sampling and in training.

    w = bound(pi(token) / mu(token)),        loss = aggregate(w * policy_term + kl_coef * kl)

Both probabilities are under the weights that sampled the token: pi as the training forward pass computes it, mu as the sampler
computed it. In exact arithmetic pi = mu. They differ in bfloat16, with weights merged for sampling, or with another inference
engine. The gradient then belongs to an off-policy objective (Yao et al., "Your efficient RL framework secretly brings you
off-policy RL training", 2025, which truncates the ratio of each token). The weight w has no gradient, and does not change the KL
term.

The four classes are the modes of TRL's `vllm_importance_sampling_mode`, with `cap` for its `clip_max` and `floor` for its
`clip_min`. They take the ratio of each token, or the product of the ratios over a sequence, and either truncate it to the bounds
or set it to 0 outside them (by token and with both bounds, this is IcePop). Discarded tokens stay in the loss's denominators, as
in TRL.

The metric `sampling/logp_difference/mean` shows whether you need a correction. In float32 it is about 1e-6, and w is 1. In
bfloat16 it was 0.02 for SmolLM2-135M, and the w of a token was at most 1.3, so a cap of 2 cuts only ratios that have gone wrong.

With `top_p`, `top_k` or `min_p` mu is still the full softmax (see `Rollout.sampling_logprobs`): truncation is not corrected.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import functional as F
from hybrid_lightning.shared.configurable import Configurable


class ImportanceCorrection(Configurable, ABC):
    """Base class of corrections: weights from log pi(token) in training and log mu(token) of the sampler, both [B, T].

    A subclass bounds the ratio of the two probabilities. `mask` is True on sampled tokens, [B, T] bool.

    Example:
        >>> class Geometric(ImportanceCorrection):
        ...     def weights(self, log_ratio, mask):
        ...         return F.sequence_means(log_ratio, mask).exp().clamp(max=2.0)
        >>> logprobs, sampled = torch.tensor([[-1.0, -1.5]]), torch.tensor([[-1.0, -1.5]])
        >>> Geometric()(logprobs, sampled, torch.tensor([[True, True]])).tolist()
        [1.0]
    """

    @abstractmethod
    def weights(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """Weights from log(pi / mu) of each token, [B, T]; the log-ratio has no gradient and is 0 outside the mask.

        Returns:
            One weight for each token, [B, T], or for each sequence, [B]; 1 where the ratio is 1. Padding may hold anything.
        """

    @torch.no_grad()
    def __call__(self, logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor) -> Tensor:
        """Compute the weights of some sequences, [B, T] or [B].

        Raises:
            ConfigError: If `weights` of a subclass returned another shape.
        """
        weights = self.weights(F.log_ratio(logprobs, sampling_logprobs, mask), mask)
        if weights.shape not in (mask.shape, mask.shape[:1]):
            raise ConfigError(
                f"{type(self).__name__}.weights returned shape {tuple(weights.shape)}; return {tuple(mask.shape)} or, with one "
                f"value per sequence, {tuple(mask.shape[:1])}"
            )
        return weights


class BoundedCorrection(ImportanceCorrection):
    """Base class of the four corrections, which holds the bounds of the ratio.

    Args:
        cap: Largest ratio. The product over a long sequence needs more room than the ratio of a token (TRL's default is 3).
        floor: Smallest ratio; 0 for no bound below.

    Raises:
        ConfigError: If the bounds exclude a ratio of 1, where sampler and training agree.
    """

    def __init__(self, cap: float = 2.0, floor: float = 0.0) -> None:
        name = type(self).__name__
        if not (math.isfinite(cap) and cap > 1):
            raise ConfigError(f"{name}: cap={cap} must be finite and above 1, the ratio where nothing differs; set e.g. 2")
        if not 0 <= floor < 1:
            raise ConfigError(f"{name}: floor={floor} must be at least 0 and below 1, the ratio where nothing differs; set 0")
        self.cap, self.floor = cap, floor

    def truncated(self, ratio: Tensor) -> Tensor:
        """The ratio, set to the nearer bound if it is outside the bounds."""
        return ratio.clamp(self.floor, self.cap)

    def discarded(self, ratio: Tensor) -> Tensor:
        """The ratio, set to 0 if it is outside the bounds."""
        return ratio.masked_fill((ratio < self.floor) | (ratio > self.cap), 0.0)


class TokenTruncation(BoundedCorrection):
    """The ratio of each token, truncated: little variance, but biased where it is cut. The correction to try first."""

    def weights(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """One weight for each token, [B, T]."""
        return self.truncated(log_ratio.exp())


class TokenMask(BoundedCorrection):
    """The ratio of each token; a token outside the bounds has weight 0."""

    def weights(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """One weight for each token, [B, T]."""
        return self.discarded(log_ratio.exp())


class SequenceTruncation(BoundedCorrection):
    """The ratio of each sequence, truncated: unbiased below `cap`, with a variance that grows with the length."""

    def weights(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """One weight for each sequence, [B]."""
        return self.truncated(log_ratio.sum(dim=1).exp())


class SequenceMask(BoundedCorrection):
    """The ratio of each sequence; a sequence outside the bounds has weight 0. TRL's default."""

    def weights(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """One weight for each sequence, [B]."""
        return self.discarded(log_ratio.sum(dim=1).exp())
