"""Computing with a sharded model by other ways than its own `forward`.

FSDP gathers the weights of a module before its forward pass, and reduces its gradients after its backward pass, around the
call of the module. The policy computes log-probabilities from parts of the model, so the whole is called once around them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

Result = TypeVar("Result")

_WITHIN = "_hybrid_lightning_within_forward"


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a model are split over ranks."""
    return isinstance(model, (FSDPModule, FullyShardedDataParallel))


def as_forward(model: nn.Module, function: Callable[[], Result]) -> Result:
    """Call a function as if it were the model's forward pass; where the model is not sharded, just call it.

    Args:
        model: Sharded or not.
        function: Computes with the model's parts. Tensors with gradient must be in what it returns, alone or in a tuple.
    """
    if not is_sharded(model) or _WITHIN in model.__dict__:
        return function()
    inner = model.module if isinstance(model, FullyShardedDataParallel) else model

    def forward() -> Result:
        restore()  # the function may itself call the model
        return function()

    restore = _replace_forward(inner, forward)
    with _within(model):
        try:
            result: Result = model()
            return result
        finally:
            restore()


def with_whole_weights(model: nn.Module, function: Callable[[], Result], as_trained: bool = False) -> Result:
    """Call a function while every rank holds all weights, so that ranks may compute different things, and differently often.

    Args:
        model: Sharded or not.
        function: Computes without gradient.
        as_trained: Round as a training pass does, where that may differ.
    """
    if isinstance(model, FSDPModule):
        return _with_whole_weights_2(model, function)
    if isinstance(model, FullyShardedDataParallel):
        with _all_flagged_as_trained(model) if as_trained else nullcontext():
            return _with_whole_weights_1(model, function)
    return function()


def _with_whole_weights_2(model: nn.Module, function: Callable[[], Result]) -> Result:
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def gathered() -> Result:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        return function()

    try:
        return as_forward(model, gathered)
    finally:
        # Since torch 2.13; before, the record of forward calls grows until the next backward pass.
        reset: Any = getattr(model, "reset_iter_state", None)
        if reset is not None:
            reset()
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)  # the root's are needed again at once


def _with_whole_weights_1(model: FullyShardedDataParallel, function: Callable[[], Result]) -> Result:
    wrappers = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    with FullyShardedDataParallel.summon_full_params(model, writeback=False), _within(model):
        # What the wrappers would do in their forward pass is done, and they refuse to do it now.
        restores = [_replace_forward(wrapper, wrapper.module.__call__) for wrapper in wrappers]
        try:
            return function()
        finally:
            for restore in restores:
                restore()


@contextmanager
def _all_flagged_as_trained(model: nn.Module) -> Iterator[None]:
    """In a training pass of FSDP1 all weights of a block need a gradient if one does, and LoRA then computes in other steps."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Replace the forward pass of one module; returns what puts it back, which may be called again."""
    own = "forward" in module.__dict__
    original = module.__dict__.get("forward")
    module.__dict__["forward"] = forward

    def restore() -> None:
        if own:
            module.__dict__["forward"] = original
        else:
            module.__dict__.pop("forward", None)

    return restore


@contextmanager
def _within(model: nn.Module) -> Iterator[None]:
    model.__dict__[_WITHIN] = True
    try:
        yield
    finally:
        del model.__dict__[_WITHIN]
