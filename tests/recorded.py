"""`Recorded`: operations that are recorded once and computed by `replay`, on the same memory each time, as a CUDA graph does."""

import torch
from torch.utils._pytree import tree_leaves

_WAITING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "bincount"}
_GARBAGE = {torch.bool: True, torch.uint8: 255}


class Recorded:
    """A recording. Until the first replay its results are garbage, and tensors that it changes are unchanged."""

    def __init__(self):
        self._calls = []  # function, arguments, and the memory of its result, or None where that has its memory elsewhere

    def note(self, function, args, kwargs):
        """Record an operation, and return where its result will be."""
        if function.overloadpacket.__name__ in _WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")
        if function._schema.is_mutable:
            self._calls.append((function, args, kwargs, None))
            return kwargs.get("out", args[0])
        result = function(*args, **kwargs)
        is_view = any(entry.alias_info is not None for entry in function._schema.returns)
        self._calls.append((function, args, kwargs, None if is_view else result))
        return result

    def end(self):
        for *_, result in self._calls:
            for part in tree_leaves(result):
                if isinstance(part, torch.Tensor) and not part.is_mkldnn:
                    part.fill_(float("nan") if part.is_floating_point() else _GARBAGE.get(part.dtype, -(10**6)))

    def replay(self):
        for function, args, kwargs, kept in self._calls:
            result = function(*args, **kwargs)
            if kept is not None:
                for old, new in zip(tree_leaves(kept), tree_leaves(result), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)
