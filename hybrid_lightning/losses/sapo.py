"""SAPO: Soft Adaptive Policy Optimization (arXiv 2511.20347).

    L = mean over sequences of (1/|o|) sum_t -A (4/tau) sigmoid(tau (r_t - 1)),      tau = tau_positive if A > 0 else tau_negative
    r_t = exp(l_t - l_old_t)

A soft gate replaces the clip. On-policy its slope is exactly 1, and the slope falls off smoothly as the ratio moves away from 1.
It falls faster where A < 0, since pushing one token down raises all other tokens of the vocabulary.

Departures from the paper: an optional KL term and entropy bonus, which the paper does not have. There is no dual clip, which
would add nothing since the gate is bounded.
"""

import math

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses.functional import token_ratio
from hybrid_lightning.losses.policy_loss import PolicyLoss
from hybrid_lightning.types import LossInputs


class SAPOLoss(PolicyLoss):
    """Sigmoid gate over one importance ratio per token; mean over sequences of the mean over tokens.

    Args:
        tau_positive: Steepness of the gate where A > 0.
        tau_negative: Steepness of the gate elsewhere.
        kl_coef: Weight of the KL to the start policy.
        kl_importance_weight: Multiply the KL by the importance ratio.
        entropy_coef: Weight of the entropy bonus.

    Raises:
        ConfigError: If a value is out of its range.
    """

    policy_term_ignores_zero_advantage = True

    def __init__(
        self,
        tau_positive: float = 1.0,
        tau_negative: float = 1.05,
        kl_coef: float = 0.0,
        kl_importance_weight: bool = False,
        entropy_coef: float = 0.0,
    ) -> None:
        super().__init__(kl_coef, kl_importance_weight, entropy_coef)
        for name, tau in (("tau_positive", tau_positive), ("tau_negative", tau_negative)):
            if not (math.isfinite(tau) and tau > 0):
                raise ConfigError(f"{type(self).__name__}: {name}={tau} must be finite and above 0; set e.g. 1.0")
        self.tau_positive, self.tau_negative = tau_positive, tau_negative

    def policy_term(self, inputs: LossInputs, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """The gated advantages, [B, T], and the ratio of each token."""
        ratio = token_ratio(inputs.logprobs, old_logprobs, inputs.completion_mask)
        advantages = inputs.advantages[:, None]
        tau = torch.full_like(advantages, self.tau_negative).masked_fill(advantages > 0, self.tau_positive)
        return -advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau, ratio
