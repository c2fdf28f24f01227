"""BNPO: GRPO with every token of a micro-batch counting the same (TRL's `loss_type="bnpo"`).

    L = mean over micro-batches of 1/(tokens of the micro-batch) sum_t -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)
    r_t = exp(l_t - l_old_t)

By this definition the gradient *does* depend on how a step is split, as that of no other loss here: with one completion a
micro-batch it is `GRPOLoss`, with the whole step in one it is `DAPOLoss` (at equal clip range), and in between a token weighs
the more the shorter the completions are that it shares a micro-batch with. It is here to repeat results that were got with
it; for a gradient that devices and `accumulate_grad_batches` do not change take `DAPOLoss`.

The micro-batch is what Lightning hands to `training_step`: the rows of a step divided by `accumulate_grad_batches` and
devices. How it is cut further to fit into memory (`max_tokens_per_micro_batch`) changes nothing. Sequences without advantage
are not left out, since their tokens count in the denominator. Truncated completions that are masked do leave their
micro-batch, and what remains of the step is dealt evenly to its micro-batches; in TRL they stay where they were, without
tokens.

The paper of this name (arXiv 2506.02864) normalises rewards by a Beta distribution and is something else. Departures from
TRL: optional dual clip and entropy bonus with the denominator of the whole step.
"""

from torch import Tensor

from hybrid_lightning.losses.functional import mean_of_micro_batch_means
from hybrid_lightning.losses.token_clipped import TokenClippedLoss
from hybrid_lightning.types import LossInputs


class BNPOLoss(TokenClippedLoss):
    """Clipped surrogate with one importance ratio a token, mean over micro-batches of the mean over their tokens.

    Arguments and errors are those of `TokenClippedLoss`.
    """

    @property
    def ignores_zero_advantage(self) -> bool:
        """False: such a sequence adds nothing itself, but its tokens count in the denominator of its micro-batch."""
        return False

    def aggregate(self, per_token_loss: Tensor, inputs: LossInputs) -> Tensor:
        """Mean over micro-batches of the mean over their tokens."""
        counts = (inputs.micro_batch_tokens, inputs.num_micro_batches)
        return mean_of_micro_batch_means(per_token_loss, inputs.completion_mask, *counts)
