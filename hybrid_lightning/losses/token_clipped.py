"""`TokenClippedLoss`: the clipped surrogate over one importance ratio a token, which GRPO and its descendants share.

They differ in the clip range and in how tokens are averaged.
"""

from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses.clipped import ClippedLoss
from hybrid_lightning.losses.functional import token_ratio
from hybrid_lightning.types import LossInputs

# Published ranges of token ratios are 0.1 to 0.3, GSPO's about 4e-4. A single token's ratio easily moves by more than 1% in one
# update: with less, most tokens would be clipped after the first minibatch and the policy would hardly learn, without saying why.
SMALLEST_CLIP = 0.01


class TokenClippedLoss(ClippedLoss):
    """Clipped surrogate with one importance ratio a token; a subclass may give another range and another aggregation.

    Args:
        clip_low: a token's ratio counts down to 1 - clip_low where A < 0.
        clip_high: a token's ratio counts up to 1 + clip_high where A > 0.
        dual_clip: a token's ratio counts up to this where A < 0; None for no bound.
        kl_coef: weight of the KL to the start policy.
        kl_importance_weight: multiply the KL by the importance ratio.
        entropy_coef: weight of the entropy bonus.

    Raises:
        ConfigError: if a value is out of its range, or the clip range is one of GSPO.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        kl_coef: float = 0.0,
        kl_importance_weight: bool = False,
        entropy_coef: float = 0.0,
    ) -> None:
        super().__init__(clip_low, clip_high, dual_clip, kl_coef, kl_importance_weight, entropy_coef)
        if min(clip_low, clip_high) < SMALLEST_CLIP:
            raise ConfigError(
                f"{type(self).__name__}: clip_low={clip_low:g}, clip_high={clip_high:g} is too small for ratios of single "
                f"tokens (below {SMALLEST_CLIP}), as if left over from a GSPO config: set clip_low=0.2 and clip_high=0.2 "
                "(DAPO: 0.28)."
            )

    def ratio(self, inputs: LossInputs, old_logprobs: Tensor) -> Tensor:
        """One ratio a token, [B, T]."""
        return token_ratio(inputs.logprobs, old_logprobs, inputs.completion_mask)
