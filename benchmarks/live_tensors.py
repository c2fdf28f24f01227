"""`LiveTensors`: counts the bytes of all live tensors while something computes."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Within this context, counts every tensor that an operator makes until it is freed, each storage once.

    That includes backward passes. It does not include scratch memory within an operator, or weights that oneDNN keeps in its own
    order.

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
        """Count tensors that were made outside of this context."""
        for tensor in tensors:
            if isinstance(tensor, DTensor):
                tensor = tensor._local_tensor
            if tensor.layout is torch.strided:  # oneDNN's own layout has no storage
                self.count_storage(tensor.untyped_storage())

    def restart_peak(self) -> None:
        """Reset the peak to the current bytes."""
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = [result] if isinstance(result, Tensor) else tree_leaves(result)  # the latter is slow, and rarely needed
        self.count(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare torch's guard of each call against compilation, which takes as long as counting; nothing is compiled here."""
        return False

    def count_storage(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, which may be known already with another size."""
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
