"""GSPO: Group Sequence Policy Optimization (arXiv 2507.18071, equations 5 and 7).

    L = mean over sequences of [ -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) + kl_coef (1/|o|) sum_t k3_t ]
    s = exp( (1/|o|) sum_t (l_t - l_old_t) )

Departures from the paper, which has no KL term: an optional one, per token as in GRPO (and in TRL), optionally weighted by
s; an optional dual clip on s and entropy bonus. "Mean over sequences" is over all sequences of the optimizer step.

With one minibatch a rollout s is exactly 1 and nothing is ever clipped: use several.

GSPO-token: GSPO with a gradient of its own for each token (arXiv 2507.18071, equations 13 and 14).

    L = mean over sequences of (1/|o|) sum_t [ -min(s_t A, clip(s_t, 1 - clip_low, 1 + clip_high) A) + kl_coef k3_t ]
    s_t = sg[s] exp(l_t - sg[l_t]),      s = exp( (1/|o|) sum_t (l_t - l_old_t) ),      sg = without gradient

In value each s_t is the sequence's s, so that all tokens of a sequence are clipped or none. While they also share one
advantage the loss and its gradient are those of `GSPOLoss`; they differ where tokens are weighed differently, by an
importance correction per token or by `TopEntropyMask`: there this class stops the gradient of exactly the tokens that are
left out, and `GSPOLoss` scales that of all of them.

Departures: those of `GSPOLoss`; with `kl_importance_weight` the KL of a token is weighed by its s_t.
"""

from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses.clipped import ClippedLoss
from hybrid_lightning.losses.functional import sequence_ratio, token_ratio
from hybrid_lightning.types import LossInputs

# Published GSPO ranges are 3e-4 to 4e-4, GRPO's start at 0.1. Averaged over a completion's tokens, log s is so small that a
# range of GRPO's size never clips anything; only completions of a few tokens want more than a thousandth.
CLIP_LIMIT = 0.1


def check_sequence_range(name: str, clip_low: float, clip_high: float) -> None:
    """Raise ConfigError, naming the loss, if a clip range is one of single tokens' ratios."""
    if max(clip_low, clip_high) >= CLIP_LIMIT:
        raise ConfigError(
            f"{name}: clip_low={clip_low:g}, clip_high={clip_high:g} is too large for ratios of whole sequences ({CLIP_LIMIT} or "
            "more), as if left over from a GRPO config: set clip_low=3e-4 and clip_high=4e-4."
        )


class GSPOLoss(ClippedLoss):
    """Clipped surrogate with one length-normalised importance ratio a sequence, mean over sequences.

    Args:
        clip_low: a sequence's ratio counts down to 1 - clip_low where A < 0.
        clip_high: a sequence's ratio counts up to 1 + clip_high where A > 0.
        dual_clip: a sequence's ratio counts up to this where A < 0; None for no bound.
        kl_coef: weight of the KL to the start policy.
        kl_importance_weight: multiply the KL by the importance ratio.
        entropy_coef: weight of the entropy bonus.

    Raises:
        ConfigError: if a value is out of its range, or the clip range is one of GRPO.
    """

    def __init__(
        self,
        clip_low: float = 3e-4,
        clip_high: float = 4e-4,
        dual_clip: float | None = None,
        kl_coef: float = 0.0,
        kl_importance_weight: bool = False,
        entropy_coef: float = 0.0,
    ) -> None:
        super().__init__(clip_low, clip_high, dual_clip, kl_coef, kl_importance_weight, entropy_coef)
        check_sequence_range(type(self).__name__, clip_low, clip_high)

    def ratio(self, inputs: LossInputs, old_logprobs: Tensor) -> Tensor:
        """One ratio a sequence, [B]."""
        return sequence_ratio(inputs.logprobs, old_logprobs, inputs.completion_mask)


class GSPOTokenLoss(ClippedLoss):
    """Clipped surrogate with one ratio a sequence and one gradient a token, mean over sequences of the mean over tokens.

    Args:
        clip_low: a sequence's ratio counts down to 1 - clip_low where A < 0.
        clip_high: a sequence's ratio counts up to 1 + clip_high where A > 0.
        dual_clip: a sequence's ratio counts up to this where A < 0; None for no bound.
        kl_coef: weight of the KL to the start policy.
        kl_importance_weight: multiply the KL by the importance ratio.
        entropy_coef: weight of the entropy bonus.

    Raises:
        ConfigError: if a value is out of its range, or the clip range is one of GRPO.
    """

    def __init__(
        self,
        clip_low: float = 3e-4,
        clip_high: float = 4e-4,
        dual_clip: float | None = None,
        kl_coef: float = 0.0,
        kl_importance_weight: bool = False,
        entropy_coef: float = 0.0,
    ) -> None:
        super().__init__(clip_low, clip_high, dual_clip, kl_coef, kl_importance_weight, entropy_coef)
        check_sequence_range(type(self).__name__, clip_low, clip_high)

    def ratio(self, inputs: LossInputs, old_logprobs: Tensor) -> Tensor:
        """The sequence's ratio for each of its tokens, [B, T], with the gradient of that token's log-probability."""
        mask = inputs.completion_mask
        of_sequence = sequence_ratio(inputs.logprobs.detach(), old_logprobs, mask)
        ones = token_ratio(inputs.logprobs, inputs.logprobs.detach(), mask)
        return of_sequence[:, None] * ones
