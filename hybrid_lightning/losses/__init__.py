"""Policy losses: swap them by class, write your own from `PolicyLoss` and the functions in `functional`."""

from hybrid_lightning.losses.base import PolicyLoss, combine_metrics
from hybrid_lightning.losses.clipped import ClippedLoss
from hybrid_lightning.losses.grpo import GRPOLoss
from hybrid_lightning.losses.gspo import GSPOLoss

__all__ = ["ClippedLoss", "GRPOLoss", "GSPOLoss", "PolicyLoss", "combine_metrics"]
