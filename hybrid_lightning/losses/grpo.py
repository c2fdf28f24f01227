"""`TokenClippedLoss`: the clipped surrogate over one importance ratio a token, which GRPO and its descendants share.

They differ in the clip range and in how tokens are averaged.

GRPO: Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, equation 3).

    L = mean over sequences of (1/|o|) sum_t [ -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) + kl_coef k3_t ]
    r_t = exp(l_t - l_old_t)

Departures from the paper: two clip ranges (equal by default); an optional dual clip on r; kl_coef is 0 by default instead of
0.04, as later work with verifiable rewards found the term unneeded (DAPO, Dr. GRPO), and it costs a reference forward pass;
an optional importance weight on the KL; an optional entropy bonus. "Mean over sequences" is over all sequences of the
optimizer step and not of one group: with groups of equal size it is the paper's mean over groups.

DAPO: Decoupled Clip and Dynamic Sampling Policy Optimization (arXiv 2503.14476, equation 8).

    L = 1/(sum over sequences of |o|) sum over sequences sum_t -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)
    r_t = exp(l_t - l_old_t)

This class is its objective: a range that is wider above ("clip-higher", 0.2 and 0.28), and every token of the optimizer step
counting the same, so that a long completion weighs more than a short one. The rest of the paper's recipe lies elsewhere: its
dynamic sampling is `PolicyModule.dynamic_sampling`, its overlong filtering `PolicyModule.mask_truncated_completions`, its soft
overlong punishment the reward `OverlongPenalty`.

Departures: the denominator is the tokens of the whole optimizer step, over its micro-batches and ranks, where the paper's sum
is over one group and TRL takes an average step of the generation batch (tokens of the batch / its steps), so that TRL's steps
weigh the more the longer their own completions are; optional dual clip, KL term (the paper removes it) and entropy bonus.

Dr. GRPO: "GRPO done right" (Understanding R1-Zero-Like Training, arXiv 2503.20783).

    L = mean over sequences of (1/max length) sum_t -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)
    A = R - mean of the group

Divided by a constant instead of its own length, a wrong completion is not punished the less the longer it is. The paper also
drops the standard deviation from the advantage: take `GroupMeanAdvantage` with this loss, which is what
configs/loss/dr_grpo.yaml does.

The constant is the sampler's `max_new_tokens` (`LossInputs.max_completion_tokens`; TRL's `max_completion_length`), which
makes the loss of a short completion small: with AdamW no matter, else the learning rate has to know. The paper's own code
takes a fixed budget too.

Departures: optional dual clip, KL term (the paper has none) and entropy bonus.

BNPO: GRPO with every token of a micro-batch counting the same (TRL's `loss_type="bnpo"`).

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

import warnings

from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses.clipped import ClippedLoss
from hybrid_lightning.losses.functional import mean_of_micro_batch_means, mean_over_positions, mean_over_tokens, token_ratio
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


class GRPOLoss(TokenClippedLoss):
    """Clipped surrogate with one importance ratio a token, mean over sequences of the mean over tokens.

    Arguments and errors are those of `TokenClippedLoss`.
    """


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


class DrGRPOLoss(TokenClippedLoss):
    """Clipped surrogate with one importance ratio a token, sum over tokens / (sequences x longest possible completion).

    Arguments and errors are those of `TokenClippedLoss`. A `PolicyModule` warns if its advantages are divided by the standard
    deviation of the group.
    """

    takes_group_std = False

    def aggregate(self, per_token_loss: Tensor, inputs: LossInputs) -> Tensor:
        """Mean over all positions that the completions of the optimizer step could have filled.

        Raises:
            ConfigError: if it is not said how many those are.
        """
        if inputs.max_completion_tokens is None:
            raise ConfigError(
                f"{type(self).__name__}: max_completion_tokens is None, but the loss divides by it: give the "
                "max_new_tokens of the sampler."
            )
        return mean_over_positions(per_token_loss, inputs.completion_mask, inputs.max_completion_tokens, inputs.num_sequences)


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
