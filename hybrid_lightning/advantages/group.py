"""GRPO's advantage (DeepSeekMath, arXiv 2402.03300): A = (R - mean) / (std + eps), both over the G samples of a prompt."""

from torch import Tensor

from hybrid_lightning.advantages.base import AdvantageEstimator, centred, positive


class GroupAdvantage(AdvantageEstimator):
    """GRPO's: (R - mean) / (std + eps), both over the group, std unbiased.

    Args:
        eps: added to the standard deviation.

    Raises:
        ConfigError: if `eps` is not positive.
    """

    divides_by_group_std = True

    def __init__(self, eps: float = 1e-4) -> None:
        self.eps = positive(eps, type(self).__name__)

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of `groups`, [P, G]."""
        return centred(groups) / (groups.std(dim=1, keepdim=True) + self.eps)
