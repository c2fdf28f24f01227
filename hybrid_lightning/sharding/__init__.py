"""Training over several processes: communication, strategies that split the model, and checkpoints that all of them can read."""

from typing import TYPE_CHECKING

from hybrid_lightning.configurable import public_names

if TYPE_CHECKING:
    from hybrid_lightning.sharding.fsdp1 import FSDP1Strategy
    from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy

__all__ = ["FSDP1Strategy", "FSDP2Strategy"]

__getattr__ = public_names(
    __name__,
    {
        "fsdp1": ["FSDP1Strategy"],
        "fsdp2": ["FSDP2Strategy"],
    },
)
