"""Computing with a sharded model by other ways than its own `forward`.

FSDP gathers the weights of a module before its forward pass, and reduces its gradients after its backward pass, by hooks on
the call of the module. The policy computes log-probabilities from parts of the model, so the whole is called once around them.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule

Result = TypeVar("Result")

_REDIRECTED = "_forward_is_redirected"


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a model are split over ranks."""
    return isinstance(model, FSDPModule)


def as_forward(model: nn.Module, function: Callable[[], Result]) -> Result:
    """Call a function as if it were the model's forward pass; where the model is not sharded, just call it.

    Args:
        model: Sharded or not.
        function: Computes with the model's parts. Tensors with gradient must be in what it returns, alone or in a tuple.
    """
    if not is_sharded(model) or getattr(model, _REDIRECTED, False):
        return function()
    original = model.__dict__.get("forward")

    def restore() -> None:
        if original is None:
            model.__dict__.pop("forward", None)
        else:
            model.__dict__["forward"] = original

    def forward() -> Result:
        restore()  # the function may itself call the model
        return function()

    model.__dict__["forward"], model.__dict__[_REDIRECTED] = forward, True
    try:
        result: Result = model()
        return result
    finally:
        restore()
        del model.__dict__[_REDIRECTED]


def with_whole_weights(model: nn.Module, function: Callable[[], Result]) -> Result:
    """Call a function while every rank holds all weights, so that ranks may compute different things, and differently often.

    Args:
        model: Sharded or not.
        function: Computes without gradient.
    """
    if not is_sharded(model):
        return function()
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def gathered() -> Result:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        return function()

    try:
        return as_forward(model, gathered)
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)  # the root's are needed again at once
