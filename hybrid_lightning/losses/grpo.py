"""GRPO: Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, equation 3).

    L = mean over sequences of (1/|o|) sum_t [ -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) + kl_coef k3_t ]
    r_t = exp(l_t - l_old_t)

Departures from the paper: two clip ranges (equal by default); an optional dual clip on r; kl_coef is 0 by default instead of
0.04, as later work with verifiable rewards found the term unneeded (DAPO, Dr. GRPO), and it costs a reference forward pass;
an optional importance weight on the KL; an optional entropy bonus. "Mean over sequences" is over all sequences of the
optimizer step and not of one group: with groups of equal size it is the paper's mean over groups.
"""

from hybrid_lightning.losses.token_clipped import TokenClippedLoss


class GRPOLoss(TokenClippedLoss):
    """Clipped surrogate with one importance ratio a token, mean over sequences of the mean over tokens.

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
