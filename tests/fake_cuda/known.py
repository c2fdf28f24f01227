"""`Known`: a fake GPU on which whole runs go through, since whole numbers have values there; `Peaks` counts what it holds.

What a run computes of numbers of tokens, masks and places is computed beside the fake tensors, so that shapes that follow from it
are right; whatever the host asks for else is 1.
"""

import traceback
from collections import Counter as Numbers
from pathlib import Path

import torch
from fake_gpu import counter
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from benchmarks.live_tensors import LiveTensors

_MOST = 10**7  # limit of the entries of a tensor with computed values
_SHAPED = {"nonzero", "masked_select", "bincount", "repeat_interleave", "unique_consecutive", "_unique2"}
_COPIES = {"_to_copy", "clone", "copy_", "cat"}
_VALUES = WeakTensorKeyDictionary()  # fake tensors with known values -> tensors of the CPU


class Known(counter()):
    """Counts, with the places in the code of what waits, copies of frozen weights, and the most logits in one tensor.

    Args:
        fake: The `FakeModel` that computes.
    """

    def __init__(self, fake):
        super().__init__()
        self.fake, self.places, self.copies, self.logits = fake, Numbers(), Numbers(), 0
        parameters = [part for part in fake.model.parameters() if part.dim() > 1 and not part.requires_grad]
        self._frozen = {part.untyped_storage()._cdata: part.numel() for part in parameters}
        self._vocabulary = fake.model.config.vocab_size
        self.patches = {"tolist": lambda part: self._tolist(part), "__deepcopy__": lambda part, memo: part.detach().clone()}

    def put(self, tensor):
        """A fake tensor with these values."""
        with unset_fake_temporarily():
            kept, like = tensor.detach().clone(), tensor.detach().to("meta")
        made = FakeTensor(self.fake.mode, like, self.fake.device)
        _VALUES[made] = kept
        return made

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
            function.name(), "CompositeImplicitAutograd"
        ):
            with self:
                return function.decompose(*args, **(kwargs or {}))
        before = len(self.counts.syncs)
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if function.overloadpacket.__name__ == "_local_scalar_dense" and args[0].device.type == "cpu":
            del self.counts.syncs[before:]  # as of an optimizer's count of steps
        self.places.update(f"{name} in {_place()}" for name in self.counts.syncs[before:])
        self._look(function.overloadpacket.__name__, args, result)
        return result

    def _look(self, name, args, result):
        made = [part for part in tree_leaves(result) if isinstance(part, torch.Tensor) and part.device.type == "cuda"]
        for part in made:
            if part.dim() == 2 and part.shape[1] == self._vocabulary and part.untyped_storage()._cdata not in self._frozen:
                self.logits = max(self.logits, part.shape[0])
        if name in _COPIES and made:
            of = (
                self._frozen.get(part.untyped_storage()._cdata, 0) for part in tree_leaves(args) if isinstance(part, torch.Tensor)
            )
            if any(0 < whole <= made[0].numel() for whole in of):
                self.copies[f"{name} in {_place()}"] += 1

    def run(self, function, args, kwargs):
        name = function.overloadpacket.__name__
        tensors = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        known = all(not isinstance(part, FakeTensor) or part in _VALUES for part in tensors)
        if name == "_local_scalar_dense":
            return self._real(function, args, kwargs) if known else 1.0 if args[0].dtype.is_floating_point else 1
        boolean = name == "index" and any(part is not None and part.dtype == torch.bool for part in args[1])
        if boolean and not known:
            return function(args[0], [place for part in args[1] for place in self._places(part)])
        if boolean or name in _SHAPED:
            found = self._real(function, args, kwargs)
            return tree_map(lambda part: self.put(part) if isinstance(part, torch.Tensor) else part, found)
        result = function(*args, **kwargs)
        made = [part for part in tree_leaves(result) if isinstance(part, FakeTensor)]
        if known and made and all(not part.dtype.is_floating_point and part.numel() < _MOST for part in made):
            values = [part for part in tree_leaves(self._real(function, args, kwargs)) if isinstance(part, torch.Tensor)]
            _VALUES.update(zip(made, values, strict=True))
        return result

    def _places(self, index):
        """A boolean index as numbers of places."""
        if index is None or index.dtype != torch.bool:
            return [index]
        with unset_fake_temporarily():
            found = _host(index).nonzero(as_tuple=True)
        return [self.put(part) for part in found]

    def _real(self, function, args, kwargs):
        args, kwargs = tree_map(_host, (args, kwargs))
        with unset_fake_temporarily():
            return function(*args, **{name: value for name, value in kwargs.items() if name != "pin_memory"})

    def _tolist(self, tensor):
        if tensor.device.type == "cuda":
            self.counts.syncs.append("tolist")
            self.places[f"tolist in {_place()}"] += 1
        with unset_fake_temporarily():
            return _VALUES[tensor].tolist()


class Peaks(LiveTensors):
    """Bytes of a device, and what FlashAttention's backward pass takes for itself (`mha_varlen_bwd` in torch's flash_api.cpp)."""

    def count(self, tensors):
        super().count(part for part in tensors if part.device.type == "cuda")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket.__name__ == "_flash_attention_backward":
            _, query, key = args[:3]
            rows, heads, size = query.shape
            segments = len(args[6]) - 1
            copies = -(-132 // (segments * heads))  # of an H100, where additions are in one order
            padded = rows + 128 * segments
            workspace = 4 * padded * heads * (copies * size + 1)
            workspace += 2 * 2 * key.shape[0] * heads * size if key.shape[1] < heads else 0
            self.peak = max(self.peak, self.bytes + workspace)
        return result


def _host(value):
    if isinstance(value, torch.Tensor):
        return _VALUES.get(value, value)
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _place():
    """The function that asked, in this project or in Lightning and torch."""
    frames = [frame for frame in reversed(traceback.extract_stack()) if "fake_cuda" not in frame.filename]
    ours = next((frame for frame in frames if "/hybrid_lightning/" in frame.filename), frames[0])
    return f"{Path(ours.filename).stem}.{ours.name}"
