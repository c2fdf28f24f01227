"""Dr. GRPO: "GRPO done right" (Understanding R1-Zero-Like Training, arXiv 2503.20783).

    L = mean over sequences of (1/max length) sum_t -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)
    A = R - mean of the group

Divided by a constant instead of its own length, a wrong completion is not punished the less the longer it is. The paper also
drops the standard deviation from the advantage: take `GroupMeanAdvantage` with this loss, which is what
configs/loss/dr_grpo.yaml does.

The constant is the sampler's `max_new_tokens` (`LossInputs.max_completion_tokens`; TRL's `max_completion_length`), which
makes the loss of a short completion small: with AdamW no matter, else the learning rate has to know. The paper's own code
takes a fixed budget too.

Departures: optional dual clip, KL term (the paper has none) and entropy bonus.
"""

from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses.functional import mean_over_positions
from hybrid_lightning.losses.token_clipped import TokenClippedLoss
from hybrid_lightning.types import LossInputs


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
