"""RLOO, REINFORCE leave-one-out (Ahmadian et al., Back to Basics, arXiv 2402.14740): A = R - mean over the other G - 1 samples.

That is G / (G - 1) times `GroupMeanAdvantage`: the baseline does not hold the completion's own reward, so that it leaves the
policy gradient unbiased.

Departure: the loss is another class. The paper's is REINFORCE on whole sequences, which on-policy is `GRPOLoss` but for the
mean over tokens; TRL's RLOOTrainer clips the ratio of whole sequences.
"""

from torch import Tensor

from hybrid_lightning.advantages.base import AdvantageEstimator, centred


class LeaveOneOutAdvantage(AdvantageEstimator):
    """RLOO's: R - mean over the other completions of the prompt."""

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of `groups`, [P, G]."""
        samples = groups.shape[1]
        return centred(groups) * (samples / (samples - 1))
