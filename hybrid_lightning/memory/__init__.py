"""Plan how much memory a run will take, from the model's config alone: no weights are loaded and no pass is computed.

    config -> sizes of the model -> bytes of its passes -> peaks of the run's phases -> the largest peak

The phases of a run are calibrating, scoring, generating, validating, updating, and the optimizer step. Weights, gradients and
optimizer state follow from arithmetic. Activations follow from the closed form by which the model runner sizes its passes
(`runner/activations.py`).
"""

from hybrid_lightning.memory.peaks import MethodMemory, plan_memory
from hybrid_lightning.memory.settings import RunSettings, TrainerFlags
from hybrid_lightning.memory.strategies import DDP, FSDP2, Components, Sharding, SingleDevice

__all__ = ["DDP", "FSDP2", "Components", "MethodMemory", "RunSettings", "Sharding", "SingleDevice", "TrainerFlags", "plan_memory"]
