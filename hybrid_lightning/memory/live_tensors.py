"""`LiveTensors`: how many bytes of tensors there are, now and at most."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Within this context every tensor that an operator makes is counted until it is freed, each storage once.

    Backward passes are seen too. Scratch memory within an operator is not, nor are weights that oneDNN keeps in its own order.

    Example:
        >>> with LiveTensors() as live:
        ...     kept = torch.zeros(10) + (torch.zeros(20) + 1).sum()
        >>> live.bytes, live.peak >= 4 * (10 + 20)
        (40, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}  # address of a storage -> its bytes

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            self._count(tensor)

    def restart_peak(self) -> None:
        """Let the peak be what there is now."""
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):  # as of nearly every operator
            self._count(result)
        else:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._count(leaf)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch else guards each call against compilers, which takes as long as counting; nothing is compiled in here."""
        return False

    def _count(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if tensor.layout is torch.strided:  # and not oneDNN's own, which has no storage
            self.count_storage(tensor.untyped_storage())

    def count_storage(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that was made before, or has another size now."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            self.bytes += size - self._sizes[key]
        else:
            self.bytes += size
            weakref.finalize(storage, self._free, key)
        self._sizes[key] = size
        self.peak = max(self.peak, self.bytes)

    def _free(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key, 0)
