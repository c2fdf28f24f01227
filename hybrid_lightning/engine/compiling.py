"""What torch compiles for accelerators: bodies of layers (`decoder_layers.py`), and what lies around them.

Uncompiled, a norm takes six kernels and a rotation five, each of which reads and writes all of its numbers; compiled, one. The
functions take tensors and numbers alone and have no gradient of their own.

It is not `torch.compile` that makes the code, but what that calls in the end: `torch.compile` looks at every call whether all is
as it was, which takes longer than a decoding step has for a layer, and makes code again for what it did not expect. Here each
kind of arguments has its code, made once, for all numbers of rows.
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

from hybrid_lightning.engine.backend import autocast_dtype

logger = logging.getLogger(__name__)

_ACCELERATORS = ("cuda", "xpu")  # devices that torch's compiler writes Triton kernels for
_WITH_BFLOAT16 = (8, 0)  # compute capability
# Round intermediate results as without a compiler, so that sampling and training agree, and choose no kernels by timing, so that
# a resumed run goes on with the same numbers. Code does not look at the sizes of what it is given: 0.2 microseconds a tensor.
_OPTIONS = {"emulate_precision_casts": True, "deterministic": True, "triton.autotune_pointwise": False, "size_asserts": False}


def why_not_compiled(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Why nothing is compiled for a device, in words for the user; empty where it pays.

    With the dtype of the products, also whether the compiler leaves functions of it uncompiled without a word.
    """
    if device.type not in _ACCELERATORS:
        return f"compiling does not pay on {device.type}"
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < _WITH_BFLOAT16:
        return "this GPU has no bfloat16, for which torch.compile leaves it out; try trainer.precision=16-mixed"
    return "TORCH_COMPILE_DISABLE=1 is set" if torch._dynamo.config.disable else ""


class CompilingError(Exception):
    """Why torch made no code of a function."""


# Axes of a tensor whose sizes change from call to call -> their names, of which equal ones have equal sizes; also a name and how
# many times its size an axis has, if another axis has the name alone.
Axes = Mapping[int, str | tuple[str, int]]
# Sizes by which torch knows the names while it makes code.
_SIZES = (509, 1021, *(prime for prime in range(11, 100) if all(prime % other for other in range(2, prime))))
CODES: dict[Hashable, "Code"] = {}  # all that was compiled in this process


class Code(NamedTuple):
    """Machine code of a function for one kind of arguments."""

    run: Callable[..., Any]  # takes a size of each name, in the order in which they first occur, and all tensors
    fits: Callable[..., bool]  # whether it is right for these sizes
    made: Any  # what torch made, which takes parts of the code with it


def compiled(function: Callable[..., Any], arguments: Sequence[Any], axes: Sequence[Axes], kind: Hashable = None) -> Code:
    """Code of a function without a gradient, made at the first call for a kind of arguments, under the current autocast.

    Who calls the code answers for it that tensors are of the same kind, and that it fits their sizes.

    Args:
        function: Of tensors and numbers, which may be in tuples.
        arguments: Tensors with sizes that change have no gaps in memory, in whatever order of axes.
        axes: Of each tensor, those whose sizes change.
        kind: What tells kinds of arguments apart; None for all that can.

    Raises:
        CompilingError: If that fails, for whatever reason, from a missing compiler to a full disk.
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

    # Each name gets a size of its own, by which torch knows it, whatever the sizes of the first call are.
    names = dict.fromkeys(name for some in axes for name in some.values() if isinstance(name, str))
    sizes = dict(zip(names, _SIZES, strict=False))
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    with torch.inference_mode(False), torch.no_grad():
        known = dict(zip(sizes, _symbols(mode, [*sizes.values()]), strict=True))
        inputs = [_example(mode, leaves[place], some, known) for place, some in zip(places, axes, strict=True)]
        symbols = [*known.values()]  # inputs as well: torch's cache keeps what it takes for granted about these
        with enable_python_dispatcher(), mode:
            # As the compiler wants it: nothing in place. What `torch._inductor.compile` puts around it, for gradients and results
            # that alias arguments, would take the host 3 microseconds a call.
            pure = torch.func.functionalize(lambda *given: flat(*given[len(sizes) :]))
            graph = make_fx(pure, select_decomp_table(), _allow_non_fake_inputs=True)(*symbols, *inputs)
        with (
            tracing(TracingContext(mode)),
            config.patch({name: value for name, value in _OPTIONS.items() if hasattr(config, name.partition(".")[0])}),
        ):
            made = compile_fx.compile_fx_inner(graph, [*symbols, *inputs], is_inference=True)
    # What is around it looks for a profiler and for what was found out by timing at every call, 4 microseconds long.
    run = getattr(made, "current_callable", made)

    @cache
    def fits(*given: int) -> bool:
        values = {symbol.node.expr: size for symbol, size in zip(symbols, given, strict=True)}  # type: ignore[attr-defined]
        return min(given) > 1 and all(bool(guard.expr.subs(values)) for guard in shapes.guards)

    if several[0]:
        return Code(lambda *given: tuple(run(list(given))), fits, made)
    return Code(lambda *given: run(list(given))[0], fits, made)


def _symbols(mode: FakeTensorMode, sizes: list[int]) -> Sequence[Any]:
    """A symbol of each size."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    with FakeTensorMode():
        like = torch.empty(sizes)
    return mode.from_tensor(like, symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK] * len(sizes))).shape


def _example(mode: FakeTensorMode, tensor: Tensor, axes: Axes, known: dict[str, Any]) -> Tensor:
    """A tensor of the same kind without data; where sizes change it has symbols."""
    with mode:
        if not axes:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        named = {axis: (name, 1) if isinstance(name, str) else name for axis, name in axes.items()}
        shape = [*tensor.shape]
        for axis, (name, times) in named.items():
            shape[axis] = times * known[name]
        return torch.empty_permuted(shape, _order(tensor), dtype=tensor.dtype, device=tensor.device)


def _order(tensor: Tensor) -> list[int]:
    """Axes, that with the largest stride first."""
    return sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)


def give_up_compiling(what: str, error: Exception | str) -> str:
    """Warn that something goes on without being compiled; `what` precedes "without torch.compile". Returns the reason."""
    remedy = "set TORCH_COMPILE_DISABLE=1 to be without the attempt and this warning"
    logger.warning("%s without torch.compile, which takes longer, since that gave %s; %s", what, error, remedy)
    return f"torch.compile gave {error}"


class OneKernel:
    """A function that is compiled for accelerators, once for all sizes that change.

    Where the compiler fails it goes on uncompiled, and says so once.

    Args:
        axes: Names the axes of each tensor, such as `rows n, n`; sizes of those named `_` do not change.
        plain: A function of tensors and numbers without a gradient.
        otherwise: What is called where nothing is compiled, such as a form with fewer passes over memory; None for `plain`.
    """

    def __init__(self, axes: str, plain: Callable[..., Any], otherwise: Callable[..., Any] | None = None) -> None:
        self.plain, self.otherwise = plain, otherwise or plain
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
            return self.otherwise(*given)
        tensors = [part for part in given if isinstance(part, Tensor)]
        static = [tuple(part.shape[axis] for axis in some) for part, some in zip(tensors, self._static, strict=True)]
        kinds = (part.dtype if isinstance(part, Tensor) else part for part in given)
        kind = (first.device, autocast_dtype(first.device), *kinds, *static)
        try:
            code = compiled(self.plain, given, self._named, kind)
        except CompilingError as error:
            self._failed = True
            give_up_compiling(f"{self._name} is computed", error)
            return self.otherwise(*given)
        sizes = [tensors[number].shape[axis] for number, axis in self._places]
        named = zip(tensors, self._named, strict=True)
        found = {(name, part.shape[axis]) for part, some in named for axis, name in some.items()}
        assert len(found) == len(sizes), "axes of the same name have other sizes"
        return code.run(*sizes, *tensors) if code.fits(*sizes) else self.otherwise(*given)
