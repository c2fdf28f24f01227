"""Plan how much memory a run will take, from the model's config alone: nothing is loaded and nothing is computed.

    config -> sizes of the model -> bytes of its passes -> peaks of the run's phases -> the largest peak

The phases of a run are calibrating, scoring, generating, validating, updating, and the optimizer step. What each holds of
weights, gradients and optimizer state is arithmetic. What it computes in between follows from the closed form by which the engine
sizes its passes (`engine/activations.py`).
"""

from hybrid_lightning.memory.peaks import MethodMemory, plan_memory
from hybrid_lightning.memory.settings import RunSettings, TrainerFlags
from hybrid_lightning.memory.strategies import DDP, FSDP2, Components, Sharding, SingleDevice

__all__ = ["DDP", "FSDP2", "Components", "MethodMemory", "RunSettings", "Sharding", "SingleDevice", "TrainerFlags", "plan_memory"]
