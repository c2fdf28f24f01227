"""Group-relative advantages: how much better a completion is than the others of its prompt. Swap estimators by class."""

from hybrid_lightning.advantages.base import AdvantageEstimator, centred
from hybrid_lightning.advantages.batch_std import BatchStdAdvantage
from hybrid_lightning.advantages.group import GroupAdvantage
from hybrid_lightning.advantages.group_mean import GroupMeanAdvantage
from hybrid_lightning.advantages.leave_one_out import LeaveOneOutAdvantage
from hybrid_lightning.advantages.per_reward import PerRewardAdvantage

__all__ = [
    "AdvantageEstimator",
    "BatchStdAdvantage",
    "GroupAdvantage",
    "GroupMeanAdvantage",
    "LeaveOneOutAdvantage",
    "PerRewardAdvantage",
    "centred",
]
