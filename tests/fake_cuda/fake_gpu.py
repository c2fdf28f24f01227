"""A GPU that does not exist: `load()` before torch is imported, then FakeTensorMode can put tensors without data on `cuda:0`.

Code sees a device of type `cuda`, so it takes the paths of a GPU; `device.py` answers what it asks `torch.cuda`. Nothing is
computed: an operation makes a tensor of the right shape and dtype. `Counter` counts what a GPU would do: kernels, the bytes that
they read and write, floating-point operations of products and attention, operations that wait for the device, and operations that
add up in no fixed order. Tensors hold no numbers, so code that needs one raises, unless `known.py` computes some or all numbers
beside them. A CPU tensor that is used together with GPU tensors raises too.
"""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))  # of scripts, for helpers of other tests


def why_not() -> str:
    """Why there can be no fake GPU here; empty where there can be one."""
    if sys.platform != "linux":
        return "the guard is built for Linux"
    return "" if shutil.which("g++") else "no C++ compiler"


def load(folder: Path) -> None:
    """Build the guard into a folder and load it; torch must not have been imported."""
    assert "torch" not in sys.modules, "the guard has to be there before torch"
    spec = importlib.util.find_spec("torch")
    torch_folder = Path(next(iter(spec.submodule_search_locations)))
    library = folder / "guard.so"
    where = [f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder}/lib"]
    built = ["g++", "-shared", "-fPIC", "-std=c++20", "-O0", f"-I{torch_folder}/include", str(HERE / "guard.cpp")]
    subprocess.run([*built, "-o", str(library), *where], check=True)
    guard = ctypes.CDLL(str(library))
    import device
    import torch

    guard.stand_guard(device.reported)
    device.stand_in(torch)


def multiplies_to_floats() -> bool:
    """Whether fake tensors have products of 16 bits with a result of 32: torch 2.8 has them of others alone."""
    import torch

    none = torch.empty(1, 1, dtype=torch.bfloat16, device="meta")
    try:
        return torch.mm(none, none, out_dtype=torch.float32).dtype == torch.float32
    except TypeError:
        return False


def counter():
    """The class `Counter`, which needs torch."""
    from dataclasses import dataclass, field

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
    from torch.utils._pytree import tree_leaves

    # Kernels that add several numbers to one place by atomics, and the flags under which they do not.
    adding = {"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"}
    putting = {"index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
    backward = {"_varlen_attn_backward", "_flash_attention_backward", "_efficient_attention_backward"}
    backward |= {"_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_efficient_attention_backward"}
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "repeat_interleave"}
    waiting |= {"bincount", "equal", "is_nonzero"}
    allocating = {"_unsafe_view", "detach", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}

    @dataclass
    class Counts:
        kernels: int = 0
        launches: int = 0  # by the host: of a kernel, or of a graph of many
        bytes: int = 0
        flops: int = 0  # of products and attention
        syncs: list[str] = field(default_factory=list)
        atomics: list[str] = field(default_factory=list)

    attending = {"_flash_attention_forward": 2, "_flash_attention_backward": 5}  # products of queries and keys
    taking = {"gather", "index", "index_select", "embedding"}  # they read only the entries that they take
    setting = {"index_put_", "_index_put_impl_", "scatter_", "index_copy_", "index_fill_"}

    class Counter(TorchDispatchMode):
        """Counts within its context; `counts` holds the result.

        Bytes are the sizes of all tensors that a kernel reads and writes, each once. An expanded tensor counts its memory only.
        """

        def __init__(self):
            super().__init__()
            self.counts, self.too_long = Counts(), 0  # by how much attention is told of longer segments than there are
            self._fused = None

        def compiled(self, body):
            """Call the compiled function: everything it computes between two products is one kernel."""
            self._fused = _Fused(self.counts)
            results = body()
            self._fused.write(tree_leaves(results))
            self._fused = None
            return results

        def run(self, function, args, kwargs):
            """What is counted."""
            return function(*args, **kwargs)

        def is_on_device(self, values):
            """Whether an operation on these values is the device's."""
            return True

        def values(self, tensor):
            """The numbers in a tensor, where attention runs by segments."""
            return tensor.cpu()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            name = function.overloadpacket.__name__
            if name in waiting and not _known_size(name, args, kwargs):
                self.counts.syncs.append(name)
            if _by_boolean(name, args):  # the host has to know the number of places
                self.counts.syncs.append("boolean index")
            if way := _between(name, args, kwargs):
                self.counts.syncs.append(way)
            accumulates = name in putting and (args[3] if len(args) > 3 else kwargs.get("accumulate", False))
            if accumulates or (name in adding and "amax" not in args):
                self.counts.atomics.append(name)
            if name in backward and torch.get_deterministic_debug_mode() != 2:  # 1: it warns, and adds by atomics
                self.counts.atomics.append(name)
            result = self.run(function, args, kwargs)
            if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:
                self.counts.kernels += (name in backward) * 3 + (name in allocating and name.count("empty"))  # which are filled
            if function.namespace == "prim" or _is_view(function) or name in allocating:
                return result
            if not self.is_on_device((args, kwargs, result)):
                return result
            attention = self._attention(function, args, kwargs) if name in attending else None
            self.counts.flops += _flops(name, args, result) if attention is None else attention[0]
            if self._fused is not None and self._fused.takes(name, (args, kwargs), result):
                return result
            if name in taking:
                moved = 2 * _size((result,)) + _size(args[1:])
            elif name in setting:
                moved = _size(args[1:]) + _size(args[-1:])
            else:
                moved = _size((args, kwargs, result)) if attention is None else attention[1] + _size(result)
            self.counts.kernels += 1
            self.counts.launches += 1
            self.counts.bytes += moved
            return result

        def _attention(self, function, args, kwargs):
            """Floating-point operations of attention by segments, and the bytes that it reads."""
            names = [argument.name for argument in function._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            used, query, key = given.get("seqused_k"), given["query"], given["key"]
            with _disable_current_modes():
                queries, keys = (self.values(given[name]).diff().long() for name in ("cum_seq_q", "cum_seq_k"))
                keys = keys if used is None else self.values(used).long()
                told, longest = (given["max_q"], given["max_k"]), (int(queries.max()), int(keys.max()))
                assert longest[0] <= told[0] and longest[1] <= told[1], f"{longest}, and attention is told {told}"
                self.too_long = max(self.too_long, told[0] - longest[0], 0 if used is not None else told[1] - longest[1])
                pairs = int((queries * keys - given["is_causal"] * (queries * (queries - 1) // 2)).sum())
                read = 2 * int(keys.sum()) * key.shape[1] * key.shape[2] * key.element_size()
            operations = 2 * query.shape[1] * query.shape[2] * pairs * attending[function.overloadpacket.__name__]
            return operations, read + _size([value for name, value in given.items() if name not in ("key", "value")])

    class _Fused:
        """The kernels between products. What one of them makes for itself is never in memory."""

        def __init__(self, counts):
            self.counts, self.kept = counts, []  # all tensors, so that none gets the memory of another
            self.inside, self.read, self.runs = set(), set(), False  # what a kernel made and has read; whether there is one

        def takes(self, name, given, result):
            """Whether an operation belongs to a kernel, or is a product."""
            given = [part for part in tree_leaves(given) if isinstance(part, torch.Tensor)]
            self.kept += [*given, result]
            if name in {"mm", "addmm"}:
                self.write(given)
                self.read, self.runs = set(), False
                return False
            if name == "cat" and not any(_memory(part) in self.inside for part in given):
                return True  # products write to where it would put them
            self.counts.kernels += not self.runs
            self.counts.launches += not self.runs
            self.runs = True
            if name in setting:
                given = given[1:]
                self.counts.bytes += _size(given[-1:])
            else:
                self.inside.add(_memory(result))
            for part in given:
                place = _memory(part), part.storage_offset()
                if place[0] not in self.inside and place not in self.read:
                    self.read.add(place)
                    self.counts.bytes += _size([part])
            return True

        def write(self, tensors):
            """Others read these tensors."""
            for part in tensors:
                if _memory(part) in self.inside:
                    self.inside.discard(_memory(part))
                    self.counts.bytes += _size([part])

    def _flops(name, args, result) -> int:
        name = name.rstrip("_")
        if name not in {"mm", "addmm", "bmm", "baddbmm"}:
            return 0
        return 2 * result.numel() * args[name.startswith(("add", "badd"))].shape[-1]

    def _memory(tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _size(values) -> int:
        found = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn)
        tensors = {id(leaf): leaf for leaf in found}.values()
        return sum(min(part.numel() * part.element_size(), part.untyped_storage().nbytes()) for part in tensors)

    def _is_view(function) -> bool:
        returned = [entry.alias_info for entry in function._schema.returns]
        return any(alias is not None and not alias.is_write for alias in returned)

    def _between(name, args, kwargs) -> str:
        """Between the memories of host and device, for which the host waits: `to host`, `from host`, or nothing."""
        if name == "copy_":
            ends = args[1].device.type, args[0].device.type
            if (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)) and "cpu" in ends:
                return ""  # which is to or from pinned memory
        elif name == "_to_copy":
            ends = args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type
            if kwargs.get("non_blocking", False):
                return ""
        else:
            return ""
        return {("cuda", "cpu"): "to host", ("cpu", "cuda"): "from host"}.get(ends, "")

    def _by_boolean(name, args) -> bool:
        indices = args[1] if name == "index" or name in putting else ()
        return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in indices)

    def _known_size(name, args, kwargs) -> bool:
        return name == "repeat_interleave" and kwargs.get("output_size") is not None

    return Counter
