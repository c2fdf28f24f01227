"""GRPO and its descendants: the clipped surrogate over one importance ratio per token, r_t = exp(l_t - l_old_t).

    class          mean over                                                              default clip range
    `GRPOLoss`     sequences, of the mean over their tokens                               0.2, 0.2
    `DAPOLoss`     all tokens of the optimizer step                                       0.2, 0.28
    `DrGRPOLoss`   sequences, of the sum over their tokens / longest possible completion  0.2, 0.2
    `BNPOLoss`     micro-batches, of the mean over their tokens                           0.2, 0.2

The equations below use the clipped surrogate of token t,

    c_t = -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)

with the advantage A, the number of tokens |o| of a sequence, and the KL estimate k3_t (see `functional.k3_kl`). All classes have
the optional dual clip, KL term and entropy bonus of `ClippedLoss`. Except for GRPO's KL term, these depart from the papers.

`GRPOLoss`: Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, equation 3).

    L = mean over sequences of (1/|o|) sum_t [ c_t + kl_coef k3_t ]

Departures from the paper: two clip ranges (equal by default), and an optional importance weight on the KL. kl_coef is 0 by
default instead of 0.04: later work with verifiable rewards found the term unnecessary (DAPO, Dr. GRPO), and it costs a reference
forward pass. The mean over sequences is over all sequences of the optimizer step instead of one group; for groups of equal size
this is the paper's mean over groups.

`DAPOLoss`: Decoupled Clip and Dynamic Sampling Policy Optimization (arXiv 2503.14476, equation 8).

    L = 1/(sum over sequences of |o|) sum over sequences sum_t c_t

The class is the paper's objective: a clip range that is wider above ("clip-higher", 0.2 and 0.28), and the same weight for every
token of the optimizer step, so that a long completion weighs more than a short one. The other parts of the paper's recipe have
their own options: dynamic sampling is `PolicyModule.dynamic_sampling`, overlong filtering is
`PolicyModule.mask_truncated_completions`, and the soft overlong punishment is the reward `OverlongPenalty`.

Departures: the denominator is the number of tokens in the whole optimizer step, over its micro-batches and ranks. The paper's sum
is over one group. TRL divides by the average over the steps of a generation batch (tokens of the batch / its steps), so there a
step with longer completions weighs more. The paper removes the KL term, which is optional here.

`DrGRPOLoss`: Dr. GRPO, "GRPO done right" (Understanding R1-Zero-Like Training, arXiv 2503.20783).

    L = mean over sequences of (1/max length) sum_t c_t,        A = R - mean of the group

Each completion is divided by a constant instead of its own length, so that a long wrong completion is not punished less per token
than a short one. The paper also drops the standard deviation from the advantage: use this loss with `GroupMeanAdvantage`, as
configs/loss/dr_grpo.yaml does.

The constant is the sampler's `max_new_tokens` (`LossInputs.max_completion_tokens`; TRL's `max_completion_length`). It makes the
loss of short completions small. That does not matter with AdamW; with other optimizers, adapt the learning rate. The paper's own
code divides by a fixed budget, too. The paper has no KL term, which is optional here.

`BNPOLoss`: GRPO with the same weight for every token of a micro-batch (TRL's `loss_type="bnpo"`).

    L = mean over micro-batches of 1/(tokens of the micro-batch) sum_t c_t

By definition, the gradient of this loss depends on how a step is split into micro-batches; no other loss here has this property.
With one completion per micro-batch it is `GRPOLoss`. With the whole step in one micro-batch it is `DAPOLoss` (at the same clip
range). In between, a token weighs more if it shares its micro-batch with short completions. Use this loss to reproduce results
that were obtained with it. Use `DAPOLoss` for a gradient that does not depend on devices and `accumulate_grad_batches`.

A micro-batch is the batch that Lightning passes to `training_step`: the rows of a step divided by `accumulate_grad_batches` and
devices. Cutting it further to fit into memory (`max_tokens_per_micro_batch`) changes nothing. Sequences without advantage stay,
since their tokens count in the denominator. Masked truncated completions leave their micro-batch, and the remaining rows of the
step are distributed evenly over its micro-batches; in TRL they stay in their micro-batch, without tokens.

Departures from TRL: an entropy bonus with the denominator of the whole step. The paper with this name (arXiv 2506.02864) has
another topic: it normalises rewards by a Beta distribution.
"""

import warnings
from typing import Any

from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses.functional import mean_over_positions, mean_over_tokens, token_ratio
from hybrid_lightning.losses.policy_loss import ClippedLoss
from hybrid_lightning.types import LossInputs

# Published clip ranges are 0.1 to 0.3 for the ratios of tokens, and about 4e-4 for GSPO. The ratio of a single token easily moves
# by more than 1% in one update. With a smaller range most tokens would be clipped after the first minibatch, and the policy would
# hardly learn, without any message.
SMALLEST_CLIP = 0.01


class TokenClippedLoss(ClippedLoss):
    """Base class of losses with the clipped surrogate and one importance ratio per token.

    Takes the arguments of `ClippedLoss`; a subclass may define another aggregation.

    Raises:
        ConfigError: If a value is out of its range, or the clip range was meant for GSPO.
    """

    def check_range(self) -> None:
        """Raise ConfigError if the clip range is too small for ratios of tokens."""
        if min(self.clip_low, self.clip_high) < SMALLEST_CLIP:
            raise ConfigError(
                f"{type(self).__name__}: clip_low={self.clip_low:g}, clip_high={self.clip_high:g} is too small for ratios of "
                f"single tokens (below {SMALLEST_CLIP}), perhaps left over from a GSPO config; set clip_low=0.2 and "
                "clip_high=0.2 (DAPO: 0.28)"
            )

    def ratio(self, inputs: LossInputs, old_logprobs: Tensor) -> Tensor:
        """The ratio of each token, [B, T]."""
        return token_ratio(inputs.logprobs, old_logprobs, inputs.sampled_mask)


class GRPOLoss(TokenClippedLoss):
    """Clipped surrogate with one importance ratio per token; mean over sequences of the mean over tokens.

    Args:
        clip_low: Where A < 0, the ratio of a token counts no less than 1 - clip_low.
        clip_high: Where A > 0, the ratio of a token counts no more than 1 + clip_high.
        **others: Arguments of `ClippedLoss`: dual clip, and the weights of KL and entropy bonus.

    Raises:
        ConfigError: If a value is out of its range, or the clip range was meant for GSPO.
    """

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.2, **others: Any) -> None:
        super().__init__(clip_low, clip_high, **others)


class DAPOLoss(TokenClippedLoss):
    """Clipped surrogate with one importance ratio per token and a wider range above; mean over the tokens of the optimizer step.

    Args:
        clip_low: Where A < 0, the ratio of a token counts no less than 1 - clip_low.
        clip_high: Where A > 0, the ratio of a token counts no more than 1 + clip_high.
        **others: Arguments of `ClippedLoss`: dual clip, and the weights of KL and entropy bonus.

    Raises:
        ConfigError: If a value is out of its range, or the clip range was meant for GSPO.

    Warns:
        UserWarning: If the range is not wider above, for example because a class switched on the command line keeps the range of
            `GRPOLoss`.
    """

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.28, **others: Any) -> None:
        super().__init__(clip_low, clip_high, **others)
        if clip_high <= clip_low:
            warnings.warn(
                f"{type(self).__name__}: clip_high={clip_high:g} is not above clip_low={clip_low:g}, so there is no clip-higher "
                "(perhaps left over from a GRPO config); DAPO has clip_low=0.2 and clip_high=0.28",
                stacklevel=2,
            )

    def aggregate(self, per_token_loss: Tensor, inputs: LossInputs) -> Tensor:
        """Mean over all tokens of the optimizer step."""
        return mean_over_tokens(per_token_loss, inputs.sampled_mask, inputs.num_tokens)


class DrGRPOLoss(GRPOLoss):
    """Clipped surrogate with one importance ratio per token; sum over tokens / (sequences x longest possible completion).

    Arguments and errors are the same as in `GRPOLoss`. A `PolicyModule` warns if its advantages are divided by the standard
    deviation of the group.
    """

    takes_group_std = False

    def aggregate(self, per_token_loss: Tensor, inputs: LossInputs) -> Tensor:
        """Mean over all positions that the completions of the optimizer step could have filled.

        Raises:
            ConfigError: If `LossInputs.max_completion_tokens` is not given.
        """
        if inputs.max_completion_tokens is None:
            raise ConfigError(
                f"{type(self).__name__}: max_completion_tokens is None, but the loss divides by it; give the "
                "max_new_tokens of the sampler"
            )
        counts = inputs.num_sequences, inputs.row_weights
        return mean_over_positions(per_token_loss, inputs.sampled_mask, inputs.max_completion_tokens, *counts)


class BNPOLoss(GRPOLoss):
    """Clipped surrogate with one importance ratio per token; mean over micro-batches of the mean over their tokens.

    Arguments and errors are the same as in `GRPOLoss`.
    """

    policy_term_ignores_zero_advantage = False  # its tokens count in the denominator of its micro-batch

    def aggregate(self, per_token_loss: Tensor, inputs: LossInputs) -> Tensor:
        """Mean over micro-batches (None: one) of the mean over their tokens."""
        return mean_over_tokens(per_token_loss, inputs.sampled_mask, inputs.micro_batch_tokens) / (inputs.num_micro_batches or 1)
