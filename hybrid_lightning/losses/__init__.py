"""Policy losses. Swap them by class, or write your own from `PolicyLoss` and the functions in `functional`.

Two parts weight the policy term of any policy loss: importance corrections (`correction`) and the choice of tokens by their
entropy (`top_entropy`). The signal of a teacher (`distillation`) is added to the loss. `SupervisedLoss` and `DPOLoss` train on
completions from the data.
"""

from hybrid_lightning.losses.correction import (
    ImportanceCorrection,
    SequenceMask,
    SequenceTruncation,
    TokenMask,
    TokenTruncation,
)
from hybrid_lightning.losses.distillation import Distillation, Divergence, ForwardKL, JensenShannon, ReverseKL, SampledReverseKL
from hybrid_lightning.losses.example_losses import DPOLoss, ExampleLoss, SupervisedLoss
from hybrid_lightning.losses.grpo import BNPOLoss, DAPOLoss, DrGRPOLoss, GRPOLoss, TokenClippedLoss
from hybrid_lightning.losses.gspo import GSPOLoss, GSPOTokenLoss
from hybrid_lightning.losses.policy_loss import ClippedLoss, PolicyLoss
from hybrid_lightning.losses.shares import combine_metrics
from hybrid_lightning.losses.top_entropy import TopEntropyMask
from hybrid_lightning.losses.unclipped import CISPOLoss, DPPOLoss, SAPOLoss

__all__ = [
    "BNPOLoss",
    "CISPOLoss",
    "ClippedLoss",
    "DAPOLoss",
    "DPOLoss",
    "DPPOLoss",
    "Distillation",
    "Divergence",
    "DrGRPOLoss",
    "ExampleLoss",
    "ForwardKL",
    "GRPOLoss",
    "GSPOLoss",
    "GSPOTokenLoss",
    "ImportanceCorrection",
    "JensenShannon",
    "PolicyLoss",
    "ReverseKL",
    "SAPOLoss",
    "SampledReverseKL",
    "SequenceMask",
    "SequenceTruncation",
    "SupervisedLoss",
    "TokenClippedLoss",
    "TokenMask",
    "TokenTruncation",
    "TopEntropyMask",
    "combine_metrics",
]
