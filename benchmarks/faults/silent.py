"""A stand-in for NCCL on a CPU: if a peer has died, no connection breaks, and a rank waits forever.

Between the GPUs of one machine NCCL communicates through memory, in which a process that dies leaves no trace.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

_COLLECTIVES = ("allgather", "_allgather_base", "allreduce", "barrier", "broadcast", "gather", "reduce", "scatter")


class Silent(dist.ProcessGroup):
    """Gloo, but connections do not break."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:  # noqa: N802
        return "silent"


def _silent(name: str) -> Callable[..., Any]:
    def call(self: Silent, *arguments: Any, **options: Any) -> Any:
        work = getattr(self.gloo, name)(*arguments, **options)
        try:
            work.wait()
        except RuntimeError as error:
            if "by peer" not in str(error):
                raise
            threading.Event().wait()
        return work

    return call


for _name in _COLLECTIVES:
    setattr(Silent, _name, _silent(_name))
dist.Backend.register_backend("silent", Silent, devices="cpu")


class SilentDDP(DDPStrategy):
    """DDP over `Silent`."""

    def __init__(self) -> None:
        super().__init__(process_group_backend="silent")
