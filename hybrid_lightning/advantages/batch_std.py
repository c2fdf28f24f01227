"""Group mean, batch scale (arXiv 2508.08221): A = (R - mean over the group) / (std over the batch + eps).

The batch is a rollout, over all ranks (TRL's `scale_rewards="batch"` likewise).
"""

from torch import Tensor

from hybrid_lightning.advantages.base import AdvantageEstimator, centred, positive


class BatchStdAdvantage(AdvantageEstimator):
    """(R - mean over the group) / (std over all rewards of the rollout + eps): an easy or hard prompt is not weighted up.

    Args:
        eps: added to the standard deviation.

    Raises:
        ConfigError: if `eps` is not positive.
    """

    def __init__(self, eps: float = 1e-4) -> None:
        self.eps = positive(eps, type(self).__name__)

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of `groups`, [P, G]."""
        return centred(groups) / (groups.std() + self.eps)
