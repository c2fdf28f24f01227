"""How much memory a run will take, from the model's config alone: nothing is loaded and nothing is computed.

    config -> sizes of the model -> traced passes of two layers -> moments of the run -> the largest moment

A *moment* is a point of the run at which memory is at a local maximum: scoring, generating, validating, updating, and the step of
the optimizer. What each holds of weights, gradients and optimizer state is arithmetic. What it computes in between is found by
letting the engine's own code run on tensors that have a shape but no memory.
"""

from hybrid_lightning.memory.peaks import MethodMemory, Parts, plan_memory
from hybrid_lightning.memory.settings import RunSettings
from hybrid_lightning.memory.strategies import DDP, FSDP1, FSDP2, Sharding, SingleDevice

__all__ = ["DDP", "FSDP1", "FSDP2", "MethodMemory", "Parts", "RunSettings", "Sharding", "SingleDevice", "plan_memory"]
