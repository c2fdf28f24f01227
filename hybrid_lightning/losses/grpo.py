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

    Arguments and errors are those of `TokenClippedLoss`.
    """
