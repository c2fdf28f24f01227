"""DAPO: Decoupled Clip and Dynamic Sampling Policy Optimization (arXiv 2503.14476, equation 8).

    L = 1/(sum over sequences of |o|) sum over sequences sum_t -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)
    r_t = exp(l_t - l_old_t)

This class is its objective: a range that is wider above ("clip-higher", 0.2 and 0.28), and every token of the optimizer step
counting the same, so that a long completion weighs more than a short one. The rest of the paper's recipe lies elsewhere: its
dynamic sampling is `PolicyModule.dynamic_sampling`, its overlong filtering `PolicyModule.mask_truncated_completions`, its soft
overlong punishment the reward `OverlongPenalty`.

Departures: the denominator is the tokens of the whole optimizer step, over its micro-batches and ranks, where the paper's sum
is over one group and TRL takes an average step of the generation batch (tokens of the batch / its steps), so that TRL's steps
weigh the more the longer their own completions are; optional dual clip, KL term (the paper removes it) and entropy bonus.
"""

import warnings

from torch import Tensor

from hybrid_lightning.losses.functional import mean_over_tokens
from hybrid_lightning.losses.token_clipped import TokenClippedLoss
from hybrid_lightning.types import LossInputs


class DAPOLoss(TokenClippedLoss):
    """Clipped surrogate with one importance ratio a token and a wider range above, mean over the tokens of the optimizer step.

    Args:
        clip_low: a token's ratio counts down to 1 - clip_low where A < 0.
        clip_high: a token's ratio counts up to 1 + clip_high where A > 0.
        dual_clip: a token's ratio counts up to this where A < 0; None for no bound.
        kl_coef: weight of the KL to the start policy.
        kl_importance_weight: multiply the KL by the importance ratio.
        entropy_coef: weight of the entropy bonus.

    Raises:
        ConfigError: if a value is out of its range, or the clip range is one of GSPO.

    Warns:
        UserWarning: if the range is not wider above, as where a class switched on the command line keeps that of `GRPOLoss`.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        dual_clip: float | None = None,
        kl_coef: float = 0.0,
        kl_importance_weight: bool = False,
        entropy_coef: float = 0.0,
    ) -> None:
        super().__init__(clip_low, clip_high, dual_clip, kl_coef, kl_importance_weight, entropy_coef)
        if clip_high <= clip_low:
            warnings.warn(
                f"{type(self).__name__}: clip_high={clip_high:g} is not above clip_low={clip_low:g}, so that there is no "
                "clip-higher, as if left over from a GRPO config; DAPO has clip_low=0.2 and clip_high=0.28",
                stacklevel=2,
            )

    def aggregate(self, per_token_loss: Tensor, inputs: LossInputs) -> Tensor:
        """Mean over all tokens of the optimizer step."""
        return mean_over_tokens(per_token_loss, inputs.completion_mask, inputs.num_tokens)
