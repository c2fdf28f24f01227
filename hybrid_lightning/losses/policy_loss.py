"""`PolicyLoss`: base class of policy losses with their common parts, so that a new loss is a class of about ten lines.

    loss = aggregate(importance_weights * policy_term + kl_coef * kl + divergence) - entropy_coef * entropy

Everything but the policy term is optional; `divergence` comes from a teacher (see `distillation`). Axes: B sequences, T
completion tokens (right-padded).

What a loss averages over as a sequence is an episode. Mostly that is one row. An episode whose history was rewritten has several
rows, which share its weight by their numbers of sampled tokens (`LossInputs.row_weights`); a ratio, mask or weight "of a
sequence" is then the row's.

A subclass defines `policy_term`, and may define `aggregate` (default: mean over sequences of the mean over tokens) and
`policy_metrics`. The base class checks the inputs, casts half precision to float32, sets tokens that were not sampled to 0, adds
the KL and entropy terms, and computes the metrics. `ClippedLoss` is the base class of losses with a clip.

Shares. A call returns the *share* of its sequences in the optimizer step's loss. The denominators count the whole step
(`LossInputs.num_sequences`, `num_tokens`), so the shares of all micro-batches and ranks add up to the loss, and the split of a
step never changes its gradient. Metrics are shares, too (see `shares`).

The KL estimate is k3 (see `functional.k3_kl`) as in GRPO (arXiv 2402.03300, equation 4): inside the aggregation, outside the
clip. With `kl_importance_weight` it is multiplied by the differentiable ratio, which corrects k3 for tokens that the old policy
sampled (DeepSeek-V3.2, arXiv 2512.02556; TRL's `use_bias_correction_kl`).

The entropy bonus is the mean entropy of the policy over all sampled tokens of the optimizer step, whatever the aggregation, so
that its weight means the same for every loss (as in TRL, except that TRL's mean is over a micro-batch; verl aggregates it like
the loss).

Importance weights correct for a sampler that differs a little from the policy (see `correction`), or leave tokens out (see
`top_entropy`). They multiply the policy term of each token after the clip, without gradient. The KL, the entropy bonus and the
metrics do not change (as in TRL, except that its bonus is then over the remaining tokens).

The off-policy sequence mask (DeepSeek-V3.2, arXiv 2512.02556, equation 9; TRL's `off_policy_mask_threshold`) removes completions
from the policy term if they have A < 0 and the current policy would hardly sample them:

    M = 0 if A < 0 and (1/|o|) sum_t (l_sampled_t - l_t) > off_policy_mask_threshold; else 1

l_sampled is the sampler's own log-probability, so stale weights and differences between sampling and training both count.
Masked tokens stay in the denominators and in the KL. With advantages of tokens, the tokens with A < 0 are masked.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import functional as F
from hybrid_lightning.losses.shares import largest, share
from hybrid_lightning.shared.configurable import Configurable
from hybrid_lightning.types import LossInputs, LossOutput


class PolicyLoss(Configurable, ABC):
    """Base class of policy losses.

    Args:
        kl_coef: Weight of the KL to the start policy; 0 leaves the term out, and no reference is computed.
        kl_importance_weight: Multiply the KL by the importance ratio, gradient included.
        entropy_coef: Weight of the entropy bonus; 0 leaves it out, and costs nothing.
        off_policy_mask_threshold: Completions with A < 0 get no policy gradient once their tokens have become less likely since
            sampling by more than this many nats on average (see the head of this file); None for no such mask.

    Raises:
        ConfigError: If a weight is negative or not finite, or the threshold not positive.

    Example:
        >>> class ReinforceLoss(PolicyLoss):
        ...     def policy_term(self, inputs, old_logprobs):
        ...         ratio = F.token_ratio(inputs.logprobs, old_logprobs, inputs.sampled_mask)
        ...         return -ratio * inputs.advantages[:, None], ratio
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> logprobs = torch.full((2, 2), -1.0, requires_grad=True)
        >>> output = ReinforceLoss()(LossInputs(logprobs, torch.tensor([1.0, -1.0]), mask))
        >>> output.loss.backward()
        >>> logprobs.grad.tolist()
        [[-0.25, -0.25], [0.5, 0.0]]
    """

    takes_token_advantages = False  # whether `policy_term` takes advantages of tokens, [B, T], too
    takes_group_std = True  # whether advantages may be divided by the standard deviation of their group
    policy_term_ignores_zero_advantage = False  # whether the aggregated policy term is the same without sequences of advantage 0

    def __init__(
        self,
        kl_coef: float = 0.0,
        kl_importance_weight: bool = False,
        entropy_coef: float = 0.0,
        off_policy_mask_threshold: float | None = None,
    ) -> None:
        name = type(self).__name__
        if not (math.isfinite(kl_coef) and kl_coef >= 0):
            raise ConfigError(f"{name}: kl_coef={kl_coef} is not a weight; use 0 for no KL term, or e.g. 0.001")
        if not (math.isfinite(entropy_coef) and entropy_coef >= 0):
            raise ConfigError(f"{name}: entropy_coef={entropy_coef} is not a weight; use 0 for no entropy bonus, or e.g. 0.001")
        if off_policy_mask_threshold is not None and not off_policy_mask_threshold > 0:
            raise ConfigError(
                f"{name}: off_policy_mask_threshold={off_policy_mask_threshold} must be above 0, or it masks completions that "
                "were just sampled; set e.g. 0.1, or null for no mask"
            )
        self.kl_coef = kl_coef
        self.kl_importance_weight = kl_importance_weight
        self.entropy_coef = entropy_coef
        self.off_policy_mask_threshold = off_policy_mask_threshold

    @property
    def needs_reference(self) -> bool:
        """Whether `LossInputs.ref_logprobs` must be given."""
        return self.kl_coef != 0

    @property
    def needs_entropy(self) -> bool:
        """Whether `LossInputs.entropy` must be given."""
        return self.entropy_coef != 0

    @property
    def ignores_zero_advantage(self) -> bool:
        """Whether a sequence of advantage 0 adds exactly 0 to the loss and its gradient, so that it can be left out.

        Every sequence contributes to a KL term and to an entropy bonus.
        """
        return self.policy_term_ignores_zero_advantage and not (self.needs_reference or self.needs_entropy)

    @abstractmethod
    def policy_term(self, inputs: LossInputs, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """The loss before KL and aggregation, and the importance ratio: one per token, [B, T], or one per sequence, [B].

        All tensors are float32 or float64. Where nothing was sampled, log-probabilities are 0, and returned values are ignored.
        `old_logprobs` [B, T] come from the inputs; if the inputs have none, they are the current ones without gradient.
        """

    def aggregate(self, per_token_loss: Tensor, inputs: LossInputs) -> Tensor:
        """Reduce the loss of each token, [B, T], to these sequences' share in the optimizer step's loss."""
        return F.mean_of_sequence_means(per_token_loss, inputs.sampled_mask, inputs.num_sequences, inputs.row_weights)

    def policy_metrics(self, inputs: LossInputs, ratio: Tensor) -> dict[str, Tensor]:
        """Metrics besides the ratio and the KL: name -> scalar share (see the head of this file)."""
        return {}

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Compute the loss of some sequences: a micro-batch, or a part of it.

        Args:
            inputs: Log-probabilities (float32, float64, or half precision, which is computed in float32), advantages,
                mask and denominators.

        Returns:
            The share of the sequences in the optimizer step's loss, differentiable in `inputs.logprobs`, and metrics, which are
            shares as well:

            - "ratio/mean": over sequences if the loss has one ratio per sequence, else over tokens; and "ratio/max"
            - "kl", with a KL term: mean over tokens, including its importance weight
            - "off_policy/masked", with that mask: share of sequences, or of tokens if advantages are per token
            - the metrics of `policy_metrics`

        Raises:
            ConfigError: If shapes or dtypes do not fit together, or the reference for the KL term or the entropy for the bonus
                is missing.
        """
        check_inputs(inputs, type(self).__name__, self.needs_reference, self.needs_entropy)
        if inputs.advantages.dim() == 2:
            self.check_token_advantages()
        inputs = clean_inputs(inputs)
        old_logprobs = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
        returned = self.policy_term(inputs, old_logprobs)
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise ConfigError(
                f"{type(self).__name__}.policy_term returned a {type(returned).__name__}; return (cost, ratio), where the ratio "
                "is for example functional.token_ratio(inputs.logprobs, old_logprobs, inputs.sampled_mask)"
            )
        term, ratio = returned
        for what, value in (("loss", term), ("ratio", ratio)):
            self._check_shape("policy_term", what, value, inputs.logprobs.shape, inputs.logprobs.shape[:1])
        per_token_loss = F.per_token(term, inputs.sampled_mask)
        if inputs.importance_weights is not None:
            per_token_loss = per_token_loss * inputs.importance_weights
        plain = ratio.detach()
        metrics = {"ratio/mean": share(plain, inputs), "ratio/max": largest(plain, inputs)} | self.policy_metrics(inputs, plain)
        if (threshold := self.off_policy_mask_threshold) is not None:
            sampling = old_logprobs if inputs.sampling_logprobs is None else inputs.sampling_logprobs
            masked = F.off_policy_mistakes(inputs.logprobs, sampling, inputs.advantages, inputs.sampled_mask, threshold)
            per_token_loss = per_token_loss.masked_fill(F.per_token(masked, inputs.sampled_mask), 0.0)
            metrics["off_policy/masked"] = share(masked.to(plain.dtype), inputs)
        if self.needs_reference:
            assert inputs.ref_logprobs is not None, "checked before"
            kl = F.k3_kl(inputs.logprobs, inputs.ref_logprobs, inputs.sampled_mask)
            if self.kl_importance_weight:
                kl = kl * F.per_token(ratio, inputs.sampled_mask)
            per_token_loss = per_token_loss + self.kl_coef * kl
            metrics["kl"] = F.mean_over_tokens(kl, inputs.sampled_mask, inputs.num_tokens)
        if inputs.divergence is not None:
            per_token_loss = per_token_loss + inputs.divergence
        loss = self.aggregate(per_token_loss, inputs)
        self._check_shape("aggregate", "loss", loss, torch.Size())
        if self.needs_entropy:
            assert inputs.entropy is not None, "checked before"
            loss = loss - self.entropy_coef * F.mean_over_tokens(inputs.entropy, inputs.sampled_mask, inputs.num_tokens)
        if inputs.logprobs.requires_grad and torch.is_grad_enabled() and not loss.requires_grad:
            raise ConfigError(
                f"{type(self).__name__}: the loss has no gradient; compute policy_term from inputs.logprobs, and detach only "
                "weights"
            )
        return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})

    def check_token_advantages(self) -> None:
        """Raise ConfigError unless the loss takes advantages of tokens."""
        if not self.takes_token_advantages:
            raise ConfigError(
                f"{type(self).__name__} takes one advantage per sequence, but model.credit=turn gives one per turn, or "
                "SampledReverseKL one per token; use another loss, such as GSPOTokenLoss for GSPO, or model.credit=episode, or "
                "model.distillation=ReverseKL; in your own loss that takes them as [B, T] set takes_token_advantages = True"
            )

    def _check_shape(self, method: str, what: str, value: Tensor, *allowed: torch.Size) -> None:
        """Raise ConfigError if a method of a subclass returned a wrong shape, which broadcasting would hide."""
        if value.shape not in allowed:
            shapes = " or, with one value per sequence, ".join(str(tuple(shape)) for shape in allowed)
            raise ConfigError(f"{type(self).__name__}.{method} returned a {what} of shape {tuple(value.shape)}; return {shapes}")


class ClippedLoss(PolicyLoss):
    """Base class of losses with the clipped surrogate of PPO (arXiv 1707.06347); a subclass defines the importance ratio r.

        -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

    Departures from PPO: two clip ranges instead of one ("clip-higher" of DAPO, arXiv 2503.14476), and optionally a bound on r
    where A < 0 ("dual clip", arXiv 1912.09729). That paper writes the bound as max(., dual_clip A), which is the same number.

    Args:
        clip_low: Where A < 0, the ratio counts no less than 1 - clip_low.
        clip_high: Where A > 0, the ratio counts no more than 1 + clip_high.
        dual_clip: Where A < 0, the ratio counts no more than this; None for no bound.
        **terms: Arguments of `PolicyLoss`: the weights of KL and entropy bonus.

    Raises:
        ConfigError: If a value is out of its range.
    """

    policy_term_ignores_zero_advantage = True
    takes_token_advantages = True

    def __init__(
        self,
        clip_low: float,
        clip_high: float,
        dual_clip: float | None = None,
        **terms: Any,
    ) -> None:
        super().__init__(**terms)
        name = type(self).__name__
        if not 0 <= clip_low < 1:
            raise ConfigError(f"{name}: clip_low={clip_low} must be at least 0 and below 1: ratios are positive; set e.g. 0.2")
        if not (math.isfinite(clip_high) and clip_high >= 0):
            raise ConfigError(f"{name}: clip_high={clip_high} must be finite and at least 0; set a large one for no clip above")
        if dual_clip is not None and not (math.isfinite(dual_clip) and dual_clip > 1 + clip_high):
            raise ConfigError(
                f"{name}: dual_clip={dual_clip} must be finite and above 1 + clip_high = {1 + clip_high:g}, or it would undo "
                f"clip_high; set e.g. {max(3.0, 2 * (1 + clip_high)):g}, or null for none"
            )
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip
        self.check_range()

    def check_range(self) -> None:
        """Raise ConfigError if the clip range does not suit the ratio of this loss; by default every range does."""

    @abstractmethod
    def ratio(self, inputs: LossInputs, old_logprobs: Tensor) -> Tensor:
        """The importance ratio of each token, [B, T], or of each sequence, [B]; arguments as in `policy_term`."""

    def policy_term(self, inputs: LossInputs, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """The clipped surrogate of `ratio`, in its shape, and the ratio."""
        ratio = self.ratio(inputs, old_logprobs)
        return F.clipped_surrogate(ratio, inputs.advantages, self.clip_low, self.clip_high, self.dual_clip), ratio

    def policy_metrics(self, inputs: LossInputs, ratio: Tensor) -> dict[str, Tensor]:
        """The shares clipped below, above and either way (as in TRL): of tokens, or of sequences if the ratio is per sequence."""
        low, high = F.clip_flags(ratio, inputs.advantages, self.clip_low, self.clip_high)
        flags = {"low": low, "high": high, "region": low | high}
        return {f"clip_ratio/{name}_mean": share(flag.to(ratio.dtype), inputs) for name, flag in flags.items()}


def check_inputs(inputs: LossInputs, name: str, needs_reference: bool, needs_entropy: bool) -> None:
    """Raise ConfigError for inputs that are missing, or that would broadcast to an unintended shape."""
    shape = tuple(inputs.logprobs.shape)
    if len(shape) != 2:
        raise ConfigError(f"{name}: logprobs has shape {shape}; give one log-probability per completion token, [B, T]")
    per_token = ("logprobs", "old_logprobs", "ref_logprobs", "sampling_logprobs", "importance_weights", "entropy", "divergence")
    of_advantages = shape if inputs.advantages.shape == shape else shape[:1]
    per_row = {"advantages": of_advantages, "row_weights": shape[:1]}
    for field, want in {**per_row, **dict.fromkeys(per_token, shape), "sampled_mask": shape}.items():
        value = getattr(inputs, field)
        if value is not None and tuple(value.shape) != want:
            raise ConfigError(f"{name}: {field} has shape {tuple(value.shape)}, but logprobs {shape}; it must be {want}")
    if needs_reference and inputs.ref_logprobs is None:
        raise ConfigError(
            f"{name}: kl_coef is not 0, but ref_logprobs is None; give the start policy's log-probabilities, or set kl_coef=0"
        )
    if needs_entropy and (inputs.entropy is None or (inputs.logprobs.requires_grad and not inputs.entropy.requires_grad)):
        what = "is None" if inputs.entropy is None else "has no gradient"
        raise ConfigError(
            f"{name}: entropy_coef is not 0, but entropy {what}; give the entropy of each token with gradient, or "
            "set entropy_coef=0"
        )


def clean_inputs(inputs: LossInputs) -> LossInputs:
    """Cast to float32 at least, set tokens that were not sampled to 0, and detach tensors that need no gradient."""
    dtype = torch.promote_types(inputs.logprobs.dtype, torch.float32)

    def unpad(values: Tensor) -> Tensor:
        return torch.where(inputs.sampled_mask, values.to(dtype), 0.0)

    old, ref, weights = inputs.old_logprobs, inputs.ref_logprobs, inputs.importance_weights
    return replace(
        inputs,
        logprobs=unpad(inputs.logprobs),
        advantages=inputs.advantages.detach().to(dtype),
        old_logprobs=None if old is None else unpad(old.detach()),
        ref_logprobs=None if ref is None else unpad(ref.detach()),
        importance_weights=None if weights is None else unpad(weights.detach()),
        entropy=None if inputs.entropy is None else unpad(inputs.entropy),
        divergence=None if inputs.divergence is None else unpad(inputs.divergence),
    )
