"""Training over several processes: communication, FSDP2, and checkpoints that resume under every strategy."""

from typing import TYPE_CHECKING

from hybrid_lightning.configurable import public_names

if TYPE_CHECKING:
    from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy

__all__ = ["FSDP2Strategy"]

__getattr__ = public_names(__name__, {"fsdp2": ["FSDP2Strategy"]})
