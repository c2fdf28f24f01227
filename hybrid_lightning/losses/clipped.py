"""`ClippedLoss`: the clipped surrogate of PPO (arXiv 1707.06347) over an importance ratio r that the subclass defines.

    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

Departures from PPO: two clip ranges instead of one ("clip-higher" of DAPO, arXiv 2503.14476), and optionally a bound on r where
A < 0 ("dual clip", arXiv 1912.09729). That paper writes the bound as max(., dual_clip A), which is the same number.
"""

import math
from abc import abstractmethod

from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import functional as F
from hybrid_lightning.losses.policy_loss import PolicyLoss
from hybrid_lightning.losses.shares import share
from hybrid_lightning.types import LossInputs


class ClippedLoss(PolicyLoss):
    """Base class of clipped losses. A subclass defines `ratio`, the importance ratio that is clipped.

    Args:
        clip_low: Where A < 0, the ratio counts no less than 1 - clip_low.
        clip_high: Where A > 0, the ratio counts no more than 1 + clip_high.
        dual_clip: Where A < 0, the ratio counts no more than this; None for no bound.
        kl_coef: Weight of the KL to the start policy.
        kl_importance_weight: Multiply the KL by the importance ratio.
        entropy_coef: Weight of the entropy bonus.

    Raises:
        ConfigError: If a value is out of its range.
    """

    policy_term_ignores_zero_advantage = True

    def __init__(
        self,
        clip_low: float,
        clip_high: float,
        dual_clip: float | None = None,
        kl_coef: float = 0.0,
        kl_importance_weight: bool = False,
        entropy_coef: float = 0.0,
    ) -> None:
        super().__init__(kl_coef, kl_importance_weight, entropy_coef)
        name = type(self).__name__
        if not 0 <= clip_low < 1:
            raise ConfigError(f"{name}: clip_low={clip_low} must be at least 0 and below 1, as ratios are positive; set e.g. 0.2")
        if not (math.isfinite(clip_high) and clip_high >= 0):
            raise ConfigError(f"{name}: clip_high={clip_high} must be finite and at least 0; set a large one for no clip above")
        if dual_clip is not None and not (math.isfinite(dual_clip) and dual_clip > 1 + clip_high):
            raise ConfigError(
                f"{name}: dual_clip={dual_clip} must be finite and above 1 + clip_high = {1 + clip_high:g}, or it would undo "
                f"clip_high; set e.g. {max(3.0, 2 * (1 + clip_high)):g}, or null for none"
            )
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip

    @abstractmethod
    def ratio(self, inputs: LossInputs, old_logprobs: Tensor) -> Tensor:
        """The importance ratio of each token, [B, T], or of each sequence, [B]; arguments as in `policy_term`."""

    def policy_term(self, inputs: LossInputs, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """The clipped surrogate of `ratio`, in its shape, and the ratio."""
        ratio = self.ratio(inputs, old_logprobs)
        return F.clipped_surrogate(ratio, inputs.advantages, self.clip_low, self.clip_high, self.dual_clip), ratio

    def policy_metrics(self, inputs: LossInputs, ratio: Tensor) -> dict[str, Tensor]:
        """The shares clipped below, above and either way (as in TRL); of tokens, or of sequences if these have one ratio each."""
        low, high = F.clip_flags(ratio, inputs.advantages, self.clip_low, self.clip_high)
        flags = {"low": low, "high": high, "region": low | high}
        return {f"clip_ratio/{name}_mean": share(flag.to(ratio.dtype), inputs) for name, flag in flags.items()}
