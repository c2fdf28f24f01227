"""GSPO, Group Sequence Policy Optimization (arXiv 2507.18071): the clipped surrogate over one importance ratio per sequence.

    s = exp( (1/|o|) sum_t (l_t - l_old_t) )        (equation 7)

`GSPOLoss` (equation 5):

    L = mean over sequences of [ -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) + kl_coef (1/|o|) sum_t k3_t ]

Departures from the paper, which has no KL term: an optional KL term, per token as in GRPO (and in TRL), optionally weighted by s;
an optional dual clip on s, and an optional entropy bonus. The mean over sequences is over all sequences of the optimizer step.

With one minibatch per rollout s is exactly 1, and nothing is ever clipped: use several.

`GSPOTokenLoss` (GSPO-token, equations 13 and 14) has a separate gradient for each token:

    L = mean over sequences of (1/|o|) sum_t [ -min(s_t A, clip(s_t, 1 - clip_low, 1 + clip_high) A) + kl_coef k3_t ]
    s_t = sg[s] exp(l_t - sg[l_t]),      sg = without gradient

The value of each s_t is the s of the sequence, so either all tokens of a sequence are clipped or none. As long as they also share
one advantage, the loss and its gradient equal `GSPOLoss`. The two differ if tokens have different weights, from an importance
correction per token or from `TopEntropyMask`: this class then stops the gradient of exactly the tokens that are left out, whereas
`GSPOLoss` scales the gradient of all of them. GSPO-token exists for advantages of tokens, as `model.credit=turn` gives them (A_t
in place of A): `GSPOLoss` refuses them.

Departures: the same as in `GSPOLoss`; with `kl_importance_weight` the KL of a token is multiplied by its s_t.
"""

from typing import Any

from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses.functional import sequence_ratio, token_ratio
from hybrid_lightning.losses.policy_loss import ClippedLoss
from hybrid_lightning.types import LossInputs

# Published clip ranges are 3e-4 to 4e-4 for GSPO, and 0.1 or more for GRPO. log s is an average over the tokens of a completion.
# It is so small that a range of GRPO's size never clips anything. Only completions of a few tokens need more than a thousandth.
CLIP_LIMIT = 0.1


class SequenceClippedLoss(ClippedLoss):
    """Clipped surrogate with one length-normalised importance ratio per sequence; a subclass defines the ratio and its gradient.

    Args:
        clip_low: Where A < 0, the ratio of a sequence counts no less than 1 - clip_low.
        clip_high: Where A > 0, the ratio of a sequence counts no more than 1 + clip_high.
        **others: Arguments of `ClippedLoss`: dual clip, and the weights of KL and entropy bonus.

    Raises:
        ConfigError: If a value is out of its range, or the clip range was meant for GRPO.
    """

    def __init__(self, clip_low: float = 3e-4, clip_high: float = 4e-4, **others: Any) -> None:
        super().__init__(clip_low, clip_high, **others)

    def check_range(self) -> None:
        """Raise ConfigError if the clip range is too large for ratios of sequences."""
        if max(self.clip_low, self.clip_high) >= CLIP_LIMIT:
            raise ConfigError(
                f"{type(self).__name__}: clip_low={self.clip_low:g}, clip_high={self.clip_high:g} is too large for ratios of "
                f"whole sequences ({CLIP_LIMIT} or more), perhaps left over from a GRPO config; set clip_low=3e-4 and "
                "clip_high=4e-4"
            )


class GSPOLoss(SequenceClippedLoss):
    """Clipped surrogate with one length-normalised importance ratio per sequence; mean over sequences.

    Arguments and errors are the same as in `SequenceClippedLoss`.
    """

    takes_token_advantages = False  # one ratio weighs one advantage, and a clip has one side

    def ratio(self, inputs: LossInputs, old_logprobs: Tensor) -> Tensor:
        """The ratio of each sequence, [B]."""
        return sequence_ratio(inputs.logprobs, old_logprobs, inputs.sampled_mask)


class GSPOTokenLoss(SequenceClippedLoss):
    """Clipped surrogate with one ratio per sequence and one gradient per token; mean over sequences of the mean over tokens.

    Arguments and errors are the same as in `SequenceClippedLoss`.
    """

    def ratio(self, inputs: LossInputs, old_logprobs: Tensor) -> Tensor:
        """The sequence's ratio for each of its tokens, [B, T], with the gradient of that token's log-probability."""
        mask = inputs.sampled_mask
        of_sequence = sequence_ratio(inputs.logprobs.detach(), old_logprobs, mask)
        ones = token_ratio(inputs.logprobs, inputs.logprobs.detach(), mask)
        return of_sequence[:, None] * ones
