"""`OneKernel`: what `torch.compile` makes one kernel of on accelerators, between products of matrices.

Uncompiled, a norm takes six kernels, each of which reads and writes all of its numbers; compiled, one.
"""

import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

logger = logging.getLogger(__name__)

_ACCELERATORS = ("cuda", "xpu")  # devices that torch's compiler writes Triton kernels for
_WITH_BFLOAT16 = (8, 0)  # compute capability
# Round intermediate results as without a compiler, so that sampling and training agree, and choose no kernels by timing, so that
# a resumed run continues with the same numbers.
_OPTIONS: dict[str, Any] = {"emulate_precision_casts": True, "deterministic": True}
_OPERATORS = torch.library.Library("hybrid_lightning", "DEF")


def compiling_pays(device: torch.device) -> bool:
    """Whether to compile for a device, if `TORCH_COMPILE_DISABLE` does not forbid it. On a CPU it does not pay."""
    return not why_not_compiled(device)


def why_not_compiled(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Why nothing is compiled for a device, in words for the user; empty where it pays.

    With the dtype of the products, also whether the compiler leaves functions of it uncompiled without a word.
    """
    if device.type not in _ACCELERATORS:
        return f"compiling does not pay on {device.type}"
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < _WITH_BFLOAT16:
        return "this GPU has no bfloat16, for which torch.compile leaves it out; try trainer.precision=16-mixed"
    return "TORCH_COMPILE_DISABLE=1 is set" if torch._dynamo.config.disable else ""


class OneKernel:
    """A function that is compiled for accelerators.

    For tensors without data, such as those of a run's plan, it is the operator `hybrid_lightning::<name>` of torch: one kernel.
    Where the compiler fails, it is computed uncompiled from then on, with one warning.

    Args:
        plain: A function of tensors and numbers without a gradient, whose arguments and results are annotated.
        otherwise: What is called where nothing is compiled, such as a form with fewer passes over memory; None for `plain`.
    """

    def __init__(self, plain: Callable[..., Any], otherwise: Callable[..., Any] | None = None) -> None:
        self.plain, self.otherwise = plain, otherwise or plain
        self._failed = False
        self._name = plain.__name__.lstrip("_").removeprefix("plain_")
        _OPERATORS.define(self._name + torch.library.infer_schema(plain, mutates_args=()))
        torch.library.register_fake(f"hybrid_lightning::{self._name}", plain, lib=_OPERATORS)
        self._operator = getattr(torch.ops.hybrid_lightning, self._name).default

    def __call__(self, first: Tensor, *rest: Any) -> Any:
        """The function's results."""
        given = [part.contiguous() if isinstance(part, Tensor) else part for part in (first, *rest)]
        if isinstance(first, FakeTensor):
            return self._operator(*given)
        if self._failed or not compiling_pays(first.device):
            return self.otherwise(*given)
        try:
            return self._compiled(*given)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # from a missing compiler to a full disk
            self._failed = True
            logger.warning(
                "%s is computed without torch.compile, which takes longer, since that gave %s: %s; "
                "set TORCH_COMPILE_DISABLE=1 to be without the attempt and this warning",
                self._name,
                type(error).__name__,
                " ".join(str(error).split())[:200],
            )
            return self.otherwise(*given)

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return compiled(self.plain)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch compiles at its first call, and once more for other sizes, which then may change."""
    from torch._inductor import config  # slow to import

    return torch.compile(function, options={name: value for name, value in _OPTIONS.items() if hasattr(config, name)})
