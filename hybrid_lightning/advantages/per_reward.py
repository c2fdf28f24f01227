"""GDPO: Group reward-Decoupled Normalization Policy Optimization (arXiv 2601.05242).

    A_k = (R_k - mean over the group) / (std over the group + eps)        for each reward k
    S = sum_k weight_k A_k
    A = S / (std of S over the batch + eps)

Where rewards are added up before they are normalised, different combinations of them can end up with the same advantage; here
each keeps its say, as much as its weight, however widely it spreads.

The batch is a rollout, over all ranks. The paper subtracts the mean of S over the batch as well (TRL's "normalize_then_sum",
too): it is zero, since that of every group is, but for rounding, which would make a gradient where all rewards tie.
"""

import torch
from torch import Tensor

from hybrid_lightning.advantages.base import AdvantageEstimator, centred, positive
from hybrid_lightning.types import Rewards


class PerRewardAdvantage(AdvantageEstimator):
    """GDPO's: each reward of a `WeightedSum` normalised within its group, summed with the weights, and scaled over the rollout.

    Args:
        eps: added to each standard deviation.

    Raises:
        ConfigError: if `eps` is not positive.
    """

    divides_by_group_std = True

    def __init__(self, eps: float = 1e-4) -> None:
        self.eps = positive(eps, type(self).__name__)

    def of_rewards(self, rewards: Rewards, samples_per_prompt: int) -> Tensor:
        """Compute the advantage of each completion from the parts of its reward (see `AdvantageEstimator.of_rewards`)."""
        total = torch.zeros_like(self.groups(rewards.total, samples_per_prompt))
        for name, part in rewards.parts.items():
            total = total + rewards.weights.get(name, 1.0) * self._normalised(self.groups(part, samples_per_prompt))
        return self._scaled(total).flatten()

    def estimate(self, groups: Tensor) -> Tensor:
        """Advantages of a single reward, [P, G]."""
        return self._scaled(self._normalised(groups))

    def _normalised(self, groups: Tensor) -> Tensor:
        return centred(groups) / (groups.std(dim=1, keepdim=True) + self.eps)

    def _scaled(self, groups: Tensor) -> Tensor:
        return groups / (groups.std() + self.eps) if len(groups) else groups
