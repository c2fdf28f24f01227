"""Compiles functions for accelerators with torch's compiler: bodies of layers (`decoder_layers.py`), and norms and the like.

Uncompiled, a norm takes six kernels and a rotation five, and each reads and writes all of its numbers; compiled, each takes one.
The functions take only tensors and numbers, and have no gradient of their own.

This file does not call `torch.compile`, but the compiler behind it. `torch.compile` checks its assumptions at every call, which
takes longer than a decoding step may spend on a layer, and recompiles when one fails. Here each kind of arguments is compiled
once, for any number of rows.
"""

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hybrid_lightning.runner.backend import autocast_dtype

logger = logging.getLogger(__name__)

_ACCELERATORS = ("cuda", "xpu")  # devices for which torch's compiler writes Triton kernels
_WITH_BFLOAT16 = (8, 0)  # compute capability
# Round intermediate results as without a compiler, so that sampling and training agree. Choose no kernels by timing, so that a
# resumed run continues with the same numbers. Check no sizes at calls: that would take 0.2 microseconds per tensor.
_OPTIONS = {"emulate_precision_casts": True, "deterministic": True, "triton.autotune_pointwise": False, "size_asserts": False}


def why_not_compiled(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Why nothing is compiled for a device, worded for the user; empty where compiling pays.

    Given the dtype of the products, also covers dtypes that the compiler silently leaves uncompiled.
    """
    if device.type not in _ACCELERATORS:
        return f"compiling does not pay on {device.type}"
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < _WITH_BFLOAT16:
        return "torch.compile needs bfloat16, which this GPU does not have; try trainer.precision=16-mixed"
    return "TORCH_COMPILE_DISABLE=1 is set" if torch._dynamo.config.disable else ""


class CompilingError(Exception):
    """torch could not compile a function; the message gives the cause."""


# Axis of a tensor whose size changes from call to call -> its name. Axes with the same name have the same size. An axis may also
# be a multiple of a name's size: (name, factor), if another axis has the plain name.
Axes = Mapping[int, str | tuple[str, int]]
# Example sizes that stand for the names during compilation.
_SIZES = (509, 1021, *(prime for prime in range(11, 100) if all(prime % other for other in range(2, prime))))
CODES: dict[Hashable, "Code"] = {}  # everything compiled in this process


class Code(NamedTuple):
    """Machine code of a function for one kind of arguments."""

    run: Callable[..., Any]  # takes the size of each name, in order of first occurrence, and all tensors
    fits: Callable[..., bool]  # whether the code is valid for these sizes
    made: Any  # torch's compiled object, kept alive since it owns parts of the code


def compiled(function: Callable[..., Any], arguments: Sequence[Any], axes: Sequence[Axes], kind: Hashable = None) -> Code:
    """Compile a function without a gradient, once per kind of arguments, under the current autocast.

    The caller of the code must ensure that tensors are of the same kind and that the code fits their sizes.

    Args:
        function: Takes tensors and numbers, which may be in tuples.
        arguments: Example arguments. Tensors with changing sizes must be dense in memory, in any order of axes.
        axes: For each tensor, its axes with changing sizes.
        kind: Key of this kind of arguments; None derives it from everything that matters.

    Raises:
        CompilingError: If compiling fails for any reason, from a missing compiler to a full disk.
    """
    key = (function, kind)
    if kind is not None and key in CODES:
        return CODES[key]
    leaves, tree = tree_flatten(tuple(arguments))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    device = tensors[0].device
    if kind is None:
        found = [str(tree), device, autocast_dtype(device), [leaf for leaf in leaves if not isinstance(leaf, Tensor)]]
        for part, some in zip(tensors, axes, strict=True):
            sizes = [some.get(axis, size) for axis, size in enumerate(part.shape)]
            found.append((part.dtype, sizes, _order(part) if some else part.stride()))
        key = (function, str(found))
    if key not in CODES:
        begin = time.perf_counter()
        try:
            CODES[key] = _compile(function, leaves, tree, axes)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise CompilingError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        name, seconds = function.__name__.lstrip("_"), time.perf_counter() - begin
        rank_zero_info(f"torch compiled {name} for {device.type} in {seconds:.1f} s")
    return CODES[key]


def _compile(function: Callable[..., Any], leaves: list[Any], tree: TreeSpec, axes: Sequence[Axes]) -> Code:
    from torch._dispatch.python import enable_python_dispatcher
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile_fx, config
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    several: list[bool] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(places, tensors, strict=True))
        results = function(*tree_unflatten([given.get(place, leaf) for place, leaf in enumerate(leaves)], tree))
        several.append(isinstance(results, tuple))
        return results if several[-1] else (results,)

    # Each name gets its own example size, whatever the sizes of the first call are.
    names = dict.fromkeys(name for some in axes for name in some.values() if isinstance(name, str))
    sizes = dict(zip(names, _SIZES, strict=False))
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    with torch.inference_mode(False), torch.no_grad():
        known = dict(zip(sizes, _symbols(mode, [*sizes.values()]), strict=True))
        inputs = [_example(mode, leaves[place], some, known) for place, some in zip(places, axes, strict=True)]
        symbols = [*known.values()]  # also inputs: torch's cache stores its assumptions about them
        with enable_python_dispatcher(), mode:
            # The compiler needs a graph without in-place operations. `torch._inductor.compile` would add wrappers for gradients
            # and aliased results: 3 microseconds per call.
            pure = torch.func.functionalize(lambda *given: flat(*given[len(sizes) :]))
            graph = make_fx(pure, select_decomp_table(), _allow_non_fake_inputs=True)(*symbols, *inputs)
        with (
            tracing(TracingContext(mode)),
            config.patch({name: value for name, value in _OPTIONS.items() if hasattr(config, name.partition(".")[0])}),
        ):
            made = compile_fx.compile_fx_inner(graph, [*symbols, *inputs], is_inference=True)
    # Skip its wrapper, which checks for a profiler and for autotuning at every call: 4 microseconds.
    run = getattr(made, "current_callable", made)

    @cache
    def fits(*given: int) -> bool:
        values = {symbol.node.expr: size for symbol, size in zip(symbols, given, strict=True)}  # type: ignore[attr-defined]
        return min(given) > 1 and all(bool(guard.expr.subs(values)) for guard in shapes.guards)

    if several[0]:
        return Code(lambda *given: tuple(run(list(given))), fits, made)
    return Code(lambda *given: run(list(given))[0], fits, made)


def _symbols(mode: FakeTensorMode, sizes: list[int]) -> Sequence[Any]:
    """A symbol for each size."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    with FakeTensorMode():
        like = torch.empty(sizes)
    return mode.from_tensor(like, symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK] * len(sizes))).shape


def _example(mode: FakeTensorMode, tensor: Tensor, axes: Axes, known: dict[str, Any]) -> Tensor:
    """A tensor of the same kind without data, with symbols as its changing sizes."""
    with mode:
        if not axes:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        named = {axis: (name, 1) if isinstance(name, str) else name for axis, name in axes.items()}
        shape = [*tensor.shape]
        for axis, (name, times) in named.items():
            shape[axis] = times * known[name]
        return torch.empty_permuted(shape, _order(tensor), dtype=tensor.dtype, device=tensor.device)


def _order(tensor: Tensor) -> list[int]:
    """Axes by descending stride."""
    return sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)


def give_up_compiling(what: str, error: Exception | str) -> str:
    """Warn that a function stays uncompiled; `what` precedes "without torch.compile". Returns the reason."""
    remedy = "set TORCH_COMPILE_DISABLE=1 to skip the attempt and this warning"
    logger.warning("%s without torch.compile, which is slower, since compiling gave %s; %s", what, error, remedy)
    return f"torch.compile gave {error}"


class OneKernel:
    """A function that is compiled once for accelerators, for all its changing sizes.

    If the compiler fails, the function runs uncompiled and logs this once.

    Args:
        axes: Names of each tensor's axes, such as `rows n, n`; the size of an axis named `_` does not change.
        plain: A function of tensors and numbers without a gradient.
    """

    def __init__(self, axes: str, plain: Callable[..., Any]) -> None:
        self.plain = plain
        names = [part.split() for part in axes.split(",")]
        self._named = [{axis: name for axis, name in enumerate(part) if name != "_"} for part in names]
        self._static = [[axis for axis, name in enumerate(part) if name == "_"] for part in names]
        places = {name: (number, axis) for number, part in reversed([*enumerate(self._named)]) for axis, name in part.items()}
        self._places = [places[name] for name in dict.fromkeys(name for part in self._named for name in part.values())]
        self._failed = False
        self._name = plain.__name__.lstrip("_")

    def __call__(self, first: Tensor, *rest: Any) -> Any:
        """The function's results."""
        given = [part.contiguous() if isinstance(part, Tensor) else part for part in (first, *rest)]
        if self._failed or why_not_compiled(first.device):
            return self.plain(*given)
        tensors = [part for part in given if isinstance(part, Tensor)]
        static = [tuple(part.shape[axis] for axis in some) for part, some in zip(tensors, self._static, strict=True)]
        kinds = (part.dtype if isinstance(part, Tensor) else part for part in given)
        kind = (first.device, autocast_dtype(first.device), *kinds, *static)
        try:
            code = compiled(self.plain, given, self._named, kind)
        except CompilingError as error:
            self._failed = True
            give_up_compiling(f"{self._name} is computed", error)
            return self.plain(*given)
        sizes = [tensors[number].shape[axis] for number, axis in self._places]
        named = zip(tensors, self._named, strict=True)
        found = {(name, part.shape[axis]) for part, some in named for axis, name in some.items()}
        assert len(found) == len(sizes), "axes with the same name differ in size"
        return code.run(*sizes, *tensors) if code.fits(*sizes) else self.plain(*given)
