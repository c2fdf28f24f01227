"""What torch compiles for accelerators: bodies of layers (`decoder_layers.py`, `trained_layers.py`), and what lies around them.

Uncompiled, a norm takes six kernels and a rotation five, each of which reads and writes all of its numbers; compiled, one. The
functions take tensors and numbers alone and have no gradient of their own: they are the forward and backward passes of autograd
functions, so that both are compiled, and what is computed again is compiled alike. Each is an operator of torch, so that the plan
of a run, which has tensors without data, and torch's profiler see one kernel, too.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

logger = logging.getLogger(__name__)

# A model has at most 2^3 combinations of kinds of projections before attention and 2^4 after it, twice with inference mode; and a
# process may sample from several models.
_MOST_VARIANTS = 64

_HALF = (torch.bfloat16, torch.float16)
# An error may be this many times that of the ordinary computation, since roundings fall otherwise. Seen: 0.7 to 1.1 times it.
_TIMES = 2
# Beside that: what sums in another order may change in float32, where the ordinary computation may have no error at all.
_FLOOR = 1e-4

_ACCELERATORS = {"cuda": "CUDA", "xpu": "XPU"}  # devices that torch's compiler writes Triton kernels for -> their dispatch keys
_WITH_BFLOAT16 = (8, 0)  # compute capability
_OPERATORS = torch.library.Library("hybrid_lightning", "DEF")


def compiling_pays(device: torch.device) -> bool:
    """Whether to compile for a device, if `TORCH_COMPILE_DISABLE` does not forbid it. On a CPU it does not pay."""
    return not why_not_compiled(device)


def why_not_compiled(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Why nothing is compiled for a device, in words for the user; empty where it pays.

    Args:
        device: The device.
        dtype: Dtype of the products, for which the compiler may leave functions uncompiled without a word; None for any.
    """
    if device.type not in _ACCELERATORS:
        return f"compiling does not pay on {device.type}"
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < _WITH_BFLOAT16:
        return "this GPU has no bfloat16, for which torch.compile leaves it out; try trainer.precision=16-mixed"
    return "TORCH_COMPILE_DISABLE=1 is set" if torch._dynamo.config.disable else ""


@contextmanager
def variants_allowed() -> Iterator[None]:
    """Within this context torch compiles as many variants of a function as a model can have, where it would stop at 8."""
    with torch._dynamo.config.patch(recompile_limit=_MOST_VARIANTS):
        yield


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at its first call."""
    from torch._inductor import config

    # Round intermediate results as without a compiler, so that sampling and training agree, and choose no kernels by timing, so
    # that a resumed run goes on with the same numbers.
    wanted = ("emulate_precision_casts", "deterministic")
    return torch.compile(function, fullgraph=True, options={name: True for name in wanted if hasattr(config, name)})


def give_up_compiling(what: str, error: Exception | str) -> str:
    """Warn that something goes on without being compiled.

    Args:
        what: What does, in words that precede "without torch.compile".
        error: What went wrong.

    Returns:
        The reason, in words for the user.
    """
    said = error if isinstance(error, str) else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    remedy = "set TORCH_COMPILE_DISABLE=1 to be without the attempt and this warning"
    logger.warning("%s without torch.compile, which takes longer, since that gave %s; %s", what, said, remedy)
    return f"torch.compile gave {said}"


def higher_precision(rows: Tensor) -> torch.dtype | None:
    """The precision in which numbers have no error beside those of the ordinary computation with some rows.

    Args:
        rows: What is computed with, under the current autocast.

    Returns:
        The dtype; None where the ordinary one is float32 in which nothing is rounded further, as that of an accelerator may be.
    """
    device = rows.device.type
    if rows.dtype in _HALF or torch.is_autocast_enabled(device):
        return torch.float32
    return torch.float64 if device == "cuda" else None


def why_not_alike(found: Tensor, ordinary: Tensor, exact: Tensor) -> str:
    """How numbers differ that should be the same up to rounding; empty if they do not.

    Errors are taken as shares of the size of each place of the last axis. Without that the few places where some models have
    numbers a thousand times as large as elsewhere would hide all others.

    Args:
        found: The numbers in question, [..., n].
        ordinary: The same by the ordinary computation in the same precision.
        exact: The same in a higher precision.
    """
    if found.dtype != ordinary.dtype:
        return f"{found.dtype} instead of {ordinary.dtype}"
    off, allowed = _error(found, exact), _TIMES * _error(ordinary, exact) + _FLOOR
    return "" if off <= allowed else f"other numbers, {off:.2g} of their size away where rounding explains {allowed:.2g}"


def _error(found: Tensor, exact: Tensor) -> float:
    wanted = exact.double() if exact.device.type != "mps" else exact
    size = wanted.pow(2).mean(dim=tuple(range(wanted.dim() - 1)) or None, keepdim=True).sqrt()
    return float(((found.to(wanted) - wanted) / size.clamp(min=1e-30)).pow(2).mean().sqrt())


def one_kernel(plain: Callable[..., Any], otherwise: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A function that is compiled for accelerators, as the operator `hybrid_lightning::<name>` of torch.

    Args:
        plain: A function of tensors and numbers without a gradient, whose arguments and results are annotated.
        otherwise: What is called where nothing is compiled, such as a form with fewer passes over memory; None for `plain`.

    Returns:
        The function. Where the compiler fails it goes on uncompiled, and says so once.
    """
    instead = plain if otherwise is None else otherwise
    failed: list[str] = []
    name = plain.__name__.lstrip("_").removeprefix("plain_")

    def call(first: Tensor, *rest: Any) -> Any:
        if failed or not compiling_pays(first.device):
            return instead(first, *rest)
        try:
            with variants_allowed():
                return compiled(plain)(first, *rest)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever its many parts raise, from a missing compiler to a full disk
            failed.append(give_up_compiling(f"{name} is computed", error))
            return instead(first, *rest)

    _OPERATORS.define(name + torch.library.infer_schema(plain, mutates_args=()))
    for key in _ACCELERATORS.values():
        _OPERATORS.impl(name, call, key)
    torch.library.register_fake(f"hybrid_lightning::{name}", plain, lib=_OPERATORS)
    operator = getattr(torch.ops.hybrid_lightning, name).default

    @wraps(plain)
    def choose(first: Tensor, *rest: Any) -> Any:
        by_operator = isinstance(first, FakeTensor) or first.device.type in _ACCELERATORS
        return operator(first, *rest) if by_operator else call(first, *rest)

    return choose
