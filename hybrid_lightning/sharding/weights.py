"""Computing with a model whose weights may be split over ranks by other ways than its own `forward`.

FSDP gathers the weights of a module before its forward pass, and reduces its gradients after its backward pass, around the
call of the module. The policy computes log-probabilities from parts of the model, so the whole is called once around them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, register_fsdp_forward_method

Result = TypeVar("Result")


class Weights:
    """Of a model that every rank has in full, so that nothing has to be gathered."""

    sharded = False  # whether they are split over ranks

    def as_forward(self, function: Callable[[], Result]) -> Result:
        """Call a function as if it were the model's forward pass.

        Args:
            function: Computes with the model's parts. Tensors with gradient must be in what it returns, alone or in a tuple.
        """
        return function()

    def gathered(self, function: Callable[[], Result], as_trained: bool = False) -> Result:
        """Call a function while every rank holds all weights, so that ranks may compute different things, and differently often.

        Args:
            function: Computes without gradient.
            as_trained: Round as a training pass does, where that may differ.
        """
        return function()


def weights_of(model: nn.Module) -> Weights:
    """How to compute with the weights of a model, which may have been split."""
    if isinstance(model, FullyShardedDataParallel):
        return _Weights1(model)
    return _Weights2(model) if isinstance(model, FSDPModule) else Weights()


class _ShardedWeights(Weights):
    sharded = True

    def __init__(self) -> None:
        self._within = False  # a forward pass, for which weights have been gathered

    @contextmanager
    def _gathered_once(self) -> Iterator[None]:
        self._within = True
        try:
            yield
        finally:
            self._within = False


class _Weights2(_ShardedWeights):
    """Of FSDP2, which can be told of another forward method."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        model.computed = _call
        register_fsdp_forward_method(model, "computed")

    def as_forward(self, function: Callable[[], Result]) -> Result:
        if self._within:
            return function()
        with self._gathered_once():
            result: Result = self._model.computed(function)
            return result

    def gathered(self, function: Callable[[], Result], as_trained: bool = False) -> Result:
        parts = [module for module in self._model.modules() if isinstance(module, FSDPModule)]

        def with_all() -> Result:
            for part in parts:
                part.set_reshard_after_forward(False, recurse=False)
                part.unshard()
            return function()

        try:
            return self.as_forward(with_all)
        finally:
            # Since torch 2.13; before, the record of forward calls grows until the next backward pass.
            reset: Any = getattr(self._model, "reset_iter_state", None)
            if reset is not None:
                reset()
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(part is not self._model, recurse=False)  # the root's are needed again at once


class _Weights1(_ShardedWeights):
    """Of FSDP1, whose wrappers call the forward pass of what they wrap: meanwhile that is the function."""

    def __init__(self, model: FullyShardedDataParallel) -> None:
        super().__init__()
        self._model = model

    def as_forward(self, function: Callable[[], Result]) -> Result:
        if self._within:
            return function()

        def forward() -> Result:
            restore()  # the function may itself call the model
            return function()

        restore = _replace_forward(self._model.module, forward)
        with self._gathered_once():
            try:
                result: Result = self._model()
                return result
            finally:
                restore()

    def gathered(self, function: Callable[[], Result], as_trained: bool = False) -> Result:
        wrappers = [module for module in self._model.modules() if isinstance(module, FullyShardedDataParallel)]
        flagged = _all_flagged_as_trained(self._model) if as_trained else nullcontext()
        with flagged, FullyShardedDataParallel.summon_full_params(self._model, writeback=False), self._gathered_once():
            # What the wrappers would do in their forward pass is done, and they refuse to do it now.
            restores = [_replace_forward(wrapper, wrapper.module.__call__) for wrapper in wrappers]
            try:
                return function()
            finally:
                for restore in restores:
                    restore()


def _call(function: Callable[[], Result]) -> Result:
    return function()


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


def _replace_forward(module: Any, forward: Callable[..., Any]) -> Callable[[], None]:
    """Replace the forward pass of one module; returns what puts it back, which may be called again."""
    original = vars(module).get("forward")
    module.forward = forward

    def restore() -> None:
        if original is not None:
            module.forward = original
        elif "forward" in vars(module):
            del module.forward

    return restore
