"""Losses that bound the update of a token by other means than a clip of its importance ratio, r_t = exp(l_t - l_old_t).

    `CISPOLoss`   caps the ratio as a weight; every token keeps its gradient
    `SAPOLoss`    replaces the clip by a sigmoid
    `DPPOLoss`    masks tokens by the change of their probability instead of the ratio

Below, sg is "without gradient" and A the advantage. All three have the optional KL term and entropy bonus of `PolicyLoss`, which
none of the papers has. A dual clip would add nothing to the cap of CISPO and to the bounded gate of SAPO.

`CISPOLoss`: Clipped IS-weight Policy Optimization (MiniMax-M1, arXiv 2506.13585).

    L = 1/(tokens of the optimizer step) sum over sequences sum_t -sg[min(r_t, cap)] A l_t

The importance weight is bounded, but no token loses its gradient. So a rare token that opens a new line of thought is still
learned, although its ratio leaves GRPO's clip range immediately.

`cap` bounds the ratio itself, as in ScaleRL (arXiv 2510.13786) and TRL (5.0); the paper writes it as 1 + eps_high. As in the
paper's experiments, there is no lower bound. The name differs on purpose from `clip_high` of the other losses, which is a
distance from 1: a class switched on the command line inherits arguments with the same name, and a cap of 0.28 would scale the
policy term down.

Departure from the paper: denominators as in `DAPOLoss`.

`SAPOLoss`: Soft Adaptive Policy Optimization (arXiv 2511.20347).

    L = mean over sequences of (1/|o|) sum_t -A (4/tau) sigmoid(tau (r_t - 1)),      tau = tau_positive if A > 0 else tau_negative

A soft gate replaces the clip. On-policy its slope is exactly 1, and the slope falls off smoothly as the ratio moves away from 1.
It falls faster where A < 0, since pushing one token down raises all other tokens of the vocabulary.

`DPPOLoss`: Divergence Proximal Policy Optimization with the binary total variation (arXiv 2602.04879; the default of prime-rl).

    L = 1/(tokens of the optimizer step) sum over sequences sum_t [ -M_t r_t A + log_ratio_coef (log r_t)^2 ]
    M_t = 0 if A > 0 and p_t - p_old_t > mask_high, or A < 0 and p_t - p_old_t < -mask_low; else 1,      p = exp(l)

A token loses its gradient once its probability, not the ratio of its probabilities, has moved too far in the direction in which
the advantage pushes it. So a rare token may become several times as likely, which a clip of the ratio forbids. The squared
log-ratio pulls tokens back to their old probability. It comes from prime-rl, with a weight of 1e-3 there (after Kimi K2.5, arXiv
2602.02276); the paper has none, and the default here is 0. With it, sequences without advantage are also trained on.

Departure: the paper's code truncates r_t at 20 and gives the gradient to l_t, which is the same below 20.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses.functional import log_ratio, mean_over_tokens, per_sequence_as, token_ratio
from hybrid_lightning.losses.policy_loss import PolicyLoss
from hybrid_lightning.losses.shares import share
from hybrid_lightning.types import LossInputs


class CISPOLoss(PolicyLoss):
    """Log-probability weighted by the advantage and a bounded importance ratio; mean over the tokens of the optimizer step.

    Args:
        cap: Largest importance weight of a token.
        **terms: Arguments of `PolicyLoss`: the weights of KL and entropy bonus.

    Raises:
        ConfigError: If a value is out of its range.
    """

    policy_term_ignores_zero_advantage = True
    takes_token_advantages = True

    def __init__(self, cap: float = 5.0, **terms: Any) -> None:
        super().__init__(**terms)
        if not (math.isfinite(cap) and cap > 1):
            raise ConfigError(
                f"{type(self).__name__}: cap={cap} must be finite and above 1, the ratio where nothing has changed; set e.g. 5"
            )
        self.cap = cap

    def policy_term(self, inputs: LossInputs, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted log-probabilities, [B, T], and the ratio of each token."""
        ratio = token_ratio(inputs.logprobs, old_logprobs, inputs.sampled_mask)
        return -ratio.detach().clamp(max=self.cap) * per_sequence_as(ratio, inputs.advantages) * inputs.logprobs, ratio

    def aggregate(self, per_token_loss: Tensor, inputs: LossInputs) -> Tensor:
        """Mean over all tokens of the optimizer step."""
        return mean_over_tokens(per_token_loss, inputs.sampled_mask, inputs.num_tokens)

    def policy_metrics(self, inputs: LossInputs, ratio: Tensor) -> dict[str, Tensor]:
        """The share of tokens with a capped weight and a positive advantage (as in TRL)."""
        capped = (ratio > self.cap) & (per_sequence_as(ratio, inputs.advantages) > 0)
        return {"cispo_clip_ratio": share(capped.to(ratio.dtype), inputs)}


class SAPOLoss(PolicyLoss):
    """Sigmoid gate over one importance ratio per token; mean over sequences of the mean over tokens.

    Args:
        tau_positive: Steepness of the gate where A > 0.
        tau_negative: Steepness of the gate elsewhere.
        **terms: Arguments of `PolicyLoss`: the weights of KL and entropy bonus.

    Raises:
        ConfigError: If a value is out of its range.
    """

    policy_term_ignores_zero_advantage = True
    takes_token_advantages = True

    def __init__(self, tau_positive: float = 1.0, tau_negative: float = 1.05, **terms: Any) -> None:
        super().__init__(**terms)
        for name, tau in (("tau_positive", tau_positive), ("tau_negative", tau_negative)):
            if not (math.isfinite(tau) and tau > 0):
                raise ConfigError(f"{type(self).__name__}: {name}={tau} must be finite and above 0; set e.g. 1.0")
        self.tau_positive, self.tau_negative = tau_positive, tau_negative

    def policy_term(self, inputs: LossInputs, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """The gated advantages, [B, T], and the ratio of each token."""
        ratio = token_ratio(inputs.logprobs, old_logprobs, inputs.sampled_mask)
        advantages = per_sequence_as(ratio, inputs.advantages)
        tau = torch.full_like(advantages, self.tau_negative).masked_fill(advantages > 0, self.tau_positive)
        return -advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau, ratio


class DPPOLoss(PolicyLoss):
    """Objective with a mask by how far each token's probability has moved; mean over the tokens of the optimizer step.

    Args:
        mask_low: Where A < 0, a token gets no gradient once its probability has fallen by more than this.
        mask_high: Where A > 0, a token gets no gradient once its probability has risen by more than this.
        log_ratio_coef: Weight of the squared log-ratio to the policy that sampled; 0 leaves the term out.
        **terms: Arguments of `PolicyLoss`: the weights of KL and entropy bonus.

    Raises:
        ConfigError: If a value is out of its range.
    """

    takes_token_advantages = True

    def __init__(self, mask_low: float = 0.2, mask_high: float = 0.2, log_ratio_coef: float = 0.0, **terms: Any) -> None:
        super().__init__(**terms)
        name = type(self).__name__
        for side, bound in (("mask_low", mask_low), ("mask_high", mask_high)):
            if not 0 < bound <= 1:
                raise ConfigError(f"{name}: {side}={bound} must be above 0 and at most 1, a difference of probabilities; set 0.2")
        if not (math.isfinite(log_ratio_coef) and log_ratio_coef >= 0):
            raise ConfigError(f"{name}: log_ratio_coef={log_ratio_coef} is not a weight; use 0 for no such term, or e.g. 0.001")
        self.mask_low, self.mask_high, self.log_ratio_coef = mask_low, mask_high, log_ratio_coef
        self.policy_term_ignores_zero_advantage = not log_ratio_coef

    def policy_term(self, inputs: LossInputs, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """The masked objective with the squared log-ratio, [B, T], and the ratio of each token."""
        ratio = token_ratio(inputs.logprobs, old_logprobs, inputs.sampled_mask)
        low, high = self._masked(inputs, old_logprobs)
        term = -(ratio * per_sequence_as(ratio, inputs.advantages)).masked_fill(low | high, 0.0)
        if self.log_ratio_coef:
            term = term + self.log_ratio_coef * log_ratio(inputs.logprobs, old_logprobs, inputs.sampled_mask) ** 2
        return term, ratio

    def aggregate(self, per_token_loss: Tensor, inputs: LossInputs) -> Tensor:
        """Mean over all tokens of the optimizer step."""
        return mean_over_tokens(per_token_loss, inputs.sampled_mask, inputs.num_tokens)

    def policy_metrics(self, inputs: LossInputs, ratio: Tensor) -> dict[str, Tensor]:
        """The shares of tokens masked because they fell, because they rose, and either way, under the names of clipped losses."""
        old_logprobs = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
        low, high = self._masked(inputs, old_logprobs)
        flags = {"low": low, "high": high, "region": low | high}
        return {f"clip_ratio/{name}_mean": share(flag.to(ratio.dtype), inputs) for name, flag in flags.items()}

    def _masked(self, inputs: LossInputs, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens have fallen too far, and which have risen too far, [B, T] bool each."""
        advantages = per_sequence_as(inputs.logprobs, inputs.advantages)
        moved = inputs.logprobs.detach().exp() - old_logprobs.exp()
        return (moved < -self.mask_low) & (advantages < 0), (moved > self.mask_high) & (advantages > 0)
