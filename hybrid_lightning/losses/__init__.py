"""Policy losses: swap them by class, write your own from `PolicyLoss` and the functions in `functional`.

And importance corrections, which weigh the policy term of any loss.
"""

from hybrid_lightning.losses.base import PolicyLoss, combine_metrics
from hybrid_lightning.losses.clipped import ClippedLoss
from hybrid_lightning.losses.correction import (
    ImportanceCorrection,
    SequenceMask,
    SequenceTruncation,
    TokenMask,
    TokenTruncation,
)
from hybrid_lightning.losses.grpo import GRPOLoss
from hybrid_lightning.losses.gspo import GSPOLoss

__all__ = [
    "ClippedLoss",
    "GRPOLoss",
    "GSPOLoss",
    "ImportanceCorrection",
    "PolicyLoss",
    "SequenceMask",
    "SequenceTruncation",
    "TokenMask",
    "TokenTruncation",
    "combine_metrics",
]
