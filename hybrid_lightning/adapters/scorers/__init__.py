"""Scorers: how sensitive a module is to being trained at low rank only."""

from hybrid_lightning.adapters.scorers.base import Scorer
from hybrid_lightning.adapters.scorers.chance import Random
from hybrid_lightning.adapters.scorers.magnitude import GradientNorm, WeightGradient
from hybrid_lightning.adapters.scorers.preconditioned import PreconditionedTail
from hybrid_lightning.adapters.scorers.probe import Probe
from hybrid_lightning.adapters.scorers.snr import SpectrumSNR
from hybrid_lightning.adapters.scorers.tail import TailEnergy, TailFraction

__all__ = [
    "GradientNorm",
    "PreconditionedTail",
    "Probe",
    "Random",
    "Scorer",
    "SpectrumSNR",
    "TailEnergy",
    "TailFraction",
    "WeightGradient",
]
