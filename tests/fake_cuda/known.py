"""`Known`: a fake GPU on which whole runs go through, since numbers have values there; `Peaks` counts what it holds.

What a run computes of numbers of tokens, masks and places is computed beside the fake tensors, so that shapes that follow from it
are right; whatever the host asks for else is 0, or True. With `exact` all numbers have values, in float64 whatever their dtype:
what a small model computes on the paths of a GPU can be compared with what it computes on a CPU.

Host and device run side by side. A copy to pinned memory may be read after a wait for an event that was recorded after it, and
such a wait costs nothing if the device has done much since. A graph computes only when it is replayed, in the memory of its
recording.
"""

import traceback
import weakref
from collections import Counter as Numbers
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import device
import segments_on_cpu  # noqa: F401  (with which attention by segments has values)
import torch
from fake_gpu import counter
from recorded import Recorded
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import _foreach_supported_types as for_optimizers
from torch.utils._foreach_utils import _foreach_supported_types as for_norms
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from benchmarks.live_tensors import LiveTensors

_MOST = 10**7  # limit of the entries of a tensor with computed values
_LONG_AGO = 500  # kernels after which an event has passed
_SHAPED = {"nonzero", "masked_select", "bincount", "repeat_interleave", "unique_consecutive", "_unique2"}
_COPIES = {"_to_copy", "clone", "copy_", "cat"}
_FLOATS = {torch.bfloat16, torch.float16, torch.float32}
COMPILED = {}  # operator -> the function that it stands for
_VALUES = WeakTensorKeyDictionary()  # fake tensors with known values -> tensors of the CPU


for types in (for_optimizers, for_norms):  # tensors of known types are computed together
    types.append(FakeTensor)


class Known(counter()):
    """Counts, with the places in the code of what waits, copies of frozen weights, and the most logits in one tensor.

    Args:
        fake: The `FakeModel` that computes.
        exact: Whether all numbers have values.
    """

    def __init__(self, fake, exact=False):
        super().__init__()
        self.fake, self.exact, self.places, self.copies, self.logits = fake, exact, Numbers(), Numbers(), 0
        self.replayed = self.pools = 0  # graphs, and the memories they are recorded in
        parameters = [part for part in fake.model.parameters() if part.dim() > 1 and not part.requires_grad]
        self._frozen = {part.untyped_storage()._cdata: part.numel() for part in parameters}
        self._vocabulary = fake.model.config.vocab_size
        self._graph = None  # which is recorded
        self._pinned = {}  # memory of the host -> number of kernels before the last copy to it
        self._events, self._arrived = {}, -1  # event -> number of kernels before it; of the last one that the host waited for
        self.patches = {name: lambda part, name=name: self._read(part, name) for name in ("tolist", "numpy")}
        self.patches["__deepcopy__"] = lambda part, memo: part.detach().clone()

    def put(self, tensor, dtype=None):
        """A fake tensor with these values; None for their own dtype."""
        with _disable_current_modes():
            kept = tensor.detach().clone()
            made = FakeTensor(self.fake.mode, torch.empty_like(kept, dtype=dtype, device="meta"), self.fake.device)
            tell(made, kept.double() if self.exact and kept.is_floating_point() else kept)
        return made

    def is_on_device(self, values):
        return any(isinstance(part, torch.Tensor) and part.device.type == "cuda" for part in tree_leaves(values))

    def values(self, tensor):
        return _VALUES[tensor]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
            function.name(), "CompositeImplicitAutograd"
        ):
            with self:
                return function.decompose(*args, **(kwargs or {}))
        before, name = len(self.counts.syncs), function.overloadpacket.__name__
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if name == "_local_scalar_dense" and args[0].device.type == "cpu":
            del self.counts.syncs[before:]  # as of an optimizer's count of steps
        self._note(self.counts.syncs[before:])
        self._look(name, args, result)
        return result

    def _note(self, waits):
        self.places.update(f"{name} in {_place()}" for name in waits)
        if waits and self._graph is not None:
            raise RuntimeError(f"{waits[0]}: operation not permitted when stream is capturing")

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

    # ---- values

    def run(self, function, args, kwargs):
        name = function.overloadpacket.__name__
        tensors = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        known = all(not isinstance(part, FakeTensor) or part in _VALUES for part in tensors)
        self._move(name, args, kwargs)
        if name in ("_local_scalar_dense", "equal", "is_pinned"):
            return self._answer(name, function, args, kwargs, known)
        boolean = name == "index" and any(part is not None and part.dtype == torch.bool for part in args[1])
        if boolean and not known:
            return function(args[0], [place for part in args[1] for place in self._places(part)])
        if boolean or name in _SHAPED:
            found = self._real(function, args, kwargs)
            dtype = args[0].dtype if args[0].is_floating_point() else None
            return tree_map(lambda part: self.put(part, dtype) if isinstance(part, torch.Tensor) else part, found)
        if name == "_pin_memory":
            function, args, kwargs = torch.ops.aten.clone.default, args[:1], {}
            result = function(*args)
            self._pin(result)
        else:
            result = function(*args, **kwargs)
        if kwargs.get("pin_memory"):
            self._pin(result)
        made = [part for part in tree_leaves(result) if isinstance(part, FakeTensor)]
        changed = tensors if function._schema.is_mutable and not made else []  # by functions that return nothing
        if known and (made or changed) and (self.exact or all(map(_is_kept, made + changed))):
            values = [part for part in tree_leaves(self._real(function, args, kwargs)) if isinstance(part, torch.Tensor)]
            _VALUES.update(zip(made, values, strict=True))
        return result

    def _answer(self, name, function, args, kwargs, known):
        if name == "is_pinned":
            return _memory(args[0]) in self._pinned
        if known:
            return self._real(function, args, kwargs)
        return name == "equal" or (0.0 if args[0].dtype.is_floating_point else 1)

    def _places(self, index):
        """A boolean index as numbers of places."""
        if index is None or index.dtype != torch.bool:
            return [index]
        with _disable_current_modes():
            found = _host(index).nonzero(as_tuple=True)
        return [self.put(part) for part in found]

    def _real(self, function, args, kwargs):
        args, kwargs = tree_map(_host, (args, kwargs))
        kwargs.pop("pin_memory", None)
        with _disable_current_modes(), self._precision():
            return function(*args, **kwargs) if self._graph is None else self._graph.recorded.note(function, args, kwargs)

    def _precision(self):
        return _Doubles() if self.exact else nullcontext()

    def _read(self, tensor, how):
        """The values of a tensor, for the host."""
        if tensor.device.type == "cuda":
            self.counts.syncs.append(how)
            self._note([how])
        assert self._pinned.get(_memory(tensor), -1) <= self._arrived, "a copy is read before it has arrived"
        with _disable_current_modes():
            values = _VALUES.get(tensor)
            return getattr(torch.zeros(tensor.shape) if values is None else values, how)()

    # ---- host and device side by side

    def _pin(self, tensor):
        self._pinned[_memory(tensor)] = -1
        weakref.finalize(tensor.untyped_storage(), self._pinned.pop, _memory(tensor), None)

    def _move(self, name, args, kwargs):
        """Look at copies that do not wait: the host's end is pinned memory."""
        if name not in ("copy_", "_to_copy") or not (kwargs.get("non_blocking") or (name == "copy_" and True in args[2:])):
            return
        there = torch.device(kwargs.get("device") or args[0].device) if name == "_to_copy" else args[0].device
        here = (args[1] if name == "copy_" else args[0]).device
        if {here.type, there.type} != {"cuda", "cpu"}:
            return
        if here.type == "cuda":  # to the host: to new memory it waits
            if name == "copy_" and _memory(args[0]) in self._pinned:
                self._pinned[_memory(args[0])] = self.counts.kernels
                return
        elif _memory(args[1] if name == "copy_" else args[0]) in self._pinned:
            return
        self.counts.syncs.append(f"{'to' if here.type == 'cuda' else 'from'} host, not pinned")

    def waits(self, what):
        self._arrived = self.counts.kernels
        self._note([what])

    def recorded(self, event):
        self._events[event] = self.counts.kernels

    def waits_for(self, event):
        if self._events[event] > self.counts.kernels - _LONG_AGO:
            self._note(["event"])
        self._arrived = max(self._arrived, self._events[event])

    # ---- graphs

    def makes_pool(self):
        self.pools += 1

    def begins(self, graph):
        self._graph, graph.recorded, graph.before = graph, Recorded(), replace(self.counts)

    def ends(self, graph):
        with _disable_current_modes():
            graph.recorded.end()
        graph.costs = {name: getattr(self.counts, name) - getattr(graph.before, name) for name in ("kernels", "bytes", "flops")}
        self.counts, self._graph = graph.before, None  # nothing was launched

    def replays(self, graph):
        self.replayed += 1
        for name, cost in {**graph.costs, "launches": 1}.items():
            setattr(self.counts, name, getattr(self.counts, name) + cost)
        with _disable_current_modes(), self._precision():
            graph.recorded.replay()


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


class Counted:
    """Counts within its context, as `known` and `live`."""

    def __init__(self, fake, exact=False):
        self.known, self.live, self._stack, self._fake = Known(fake, exact), Peaks(), ExitStack(), fake

    def __enter__(self):
        self.live.count(self._fake.model.parameters())
        device.listeners.append(self.known)
        self._stack.callback(device.listeners.remove, self.known)
        patches = mock.patch.multiple(FakeTensor, **self.known.patches)
        on_host = mock.patch.object(FakeTensorMode, "avoid_device_init", True)  # torch makes tensors there, though it sees a GPU
        for context in (patches, on_host, self._fake.mode, self.live, self.known):
            self._stack.enter_context(context)
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)


def _is_kept(tensor):
    """Whether a tensor's values are computed: whole numbers, and a number of the host, as an optimizer's count of steps."""
    if tensor.dtype.is_floating_point:
        return tensor.device.type == "cpu" and tensor.dim() == 0
    return tensor.numel() < _MOST


def tell(tensor, values):
    """Give a fake tensor values."""
    _VALUES[tensor] = values


def real(tensor):
    """The values of a fake tensor."""
    return _VALUES[tensor]


def _memory(tensor):
    return tensor.untyped_storage()._cdata


def _host(value):
    if isinstance(value, torch.Tensor):
        return _VALUES.get(value, value)
    return torch.device("cpu") if isinstance(value, torch.device) else value


class _Doubles(TorchDispatchMode):
    """Computes all floating-point numbers in float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in COMPILED:
            with self:
                return COMPILED[function](*args)
        args, kwargs = tree_map(
            lambda part: torch.float64 if isinstance(part, torch.dtype) and part in _FLOATS else part, (args, kwargs or {})
        )
        if function is torch.ops.aten.mm.dtype:  # which CPUs do not have
            function, args = torch.ops.aten.mm.default, args[:2]
        result = function(*args, **kwargs)
        return tree_map(lambda part: part.double() if isinstance(part, torch.Tensor) and part.dtype in _FLOATS else part, result)


def _place():
    """The function that asked, in this project or in Lightning and torch."""
    frames = [frame for frame in reversed(traceback.extract_stack()) if "fake_cuda" not in frame.filename]
    ours = next((frame for frame in frames if "/hybrid_lightning/" in frame.filename), frames[0])
    return f"{Path(ours.filename).stem}.{ours.name}"
