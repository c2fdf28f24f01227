"""Dr. GRPO's advantage (arXiv 2503.20783): A = R - mean over the G samples of a prompt."""

from torch import Tensor

from hybrid_lightning.advantages.base import AdvantageEstimator, centred


class GroupMeanAdvantage(AdvantageEstimator):
    """Dr. GRPO's: R - mean over the group. Without std, easy and hard prompts are not weighted up."""

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of `groups`, [P, G]."""
        return centred(groups)
