"""`Weights`: computing with a model whose weights may be split over ranks, by other ways than its own `forward`.

FSDP gathers the weights of a module before its forward pass, and reduces its gradients after its backward pass, around the
call of the module. The policy computes log-probabilities from parts of the model, so the whole is called once around them.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, register_fsdp_forward_method
from torch.distributed.fsdp._common_utils import TrainingState

Result = TypeVar("Result")


class Weights:
    """Of a model that every rank has in full, so that nothing has to be gathered."""

    sharded = False  # whether they are split over ranks
    passes_together = False  # whether ranks gather weights in each pass `in_passes`, and so have to make the same number of them

    def as_forward(self, function: Callable[[], Result]) -> Result:
        """Call a function, which computes with the model's parts, as if it were the model's forward pass.

        Tensors with gradient must be in what it returns, alone or in a tuple.
        """
        return function()

    def gathered(self, function: Callable[[], Result], as_trained: bool = False) -> Result:
        """Call a function, without gradient, while every rank holds all weights, so that ranks may compute different things.

        They may also do so differently often. `as_trained` rounds as a training pass does, where that may differ.
        """
        return function()

    def in_passes(self, function: Callable[[], Result], as_trained: bool = False) -> Result:
        """Call a function that makes whole passes, without gradient, and gather weights for them as in training where possible.

        Where `passes_together` it makes as many passes on every rank. `as_trained` is that of `gathered`.
        """
        return self.gathered(function, as_trained)

    def shape(self, module: nn.Module, name: str) -> tuple[int, ...]:
        """Shape of a module's own weight of this name, as it is when it is whole."""
        return tuple(module.get_parameter(name).shape)

    def owner(self, module: nn.Module) -> nn.Module | None:
        """The part of the model whose weights are gathered together, and this module's with them; None where no part is."""
        return None

    def whole(self, owner: nn.Module | None) -> AbstractContextManager[None]:
        """Within this context the weights of one such part are whole, and need not be where `owner` is None.

        A weight that FSDP2 has split says so itself, and gathers itself (`DTensor.full_tensor`).
        """
        return nullcontext()


class FSDP1Unit(FullyShardedDataParallel):
    """A part of a model whose weights FSDP1 gathers together.

    It can be called while all weights are summoned, too. Then there is nothing to gather, and FSDP1's own forward pass refuses.
    """

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Of the module that it wraps, whose weights are gathered meanwhile."""
        if self.training_state == TrainingState.SUMMON_FULL_PARAMS:
            return self.module(*arguments, **options)
        return super().forward(*arguments, **options)


class _OrFunction(ActivationWrapper):
    """A model, or a function that is computed in its place, between the outermost unit of FSDP1 and the model.

    The base class is torch's for wrappers that FSDP1 knows: it leaves them out of the names of weights and out of `unit.module`.
    """

    def forward(self, *arguments: Any, computed_by: Callable[[], Any] | None = None, **options: Any) -> Any:
        """The result of `computed_by`, if there is such a function, or else of the model."""
        if computed_by is not None:
            return computed_by()
        return self._checkpoint_wrapped_module(*arguments, **options)


def split_by_fsdp1(model: nn.Module, blocks: Collection[nn.Module], **options: Any) -> FSDP1Unit:
    """Split a model that every rank has in full into units of FSDP1, such that `weights_of` can compute with it.

    The blocks in it are replaced by units, and what is outside of them is one more; FSDP1's own wrapping policies would make
    units of its own class. `options` are those of `FullyShardedDataParallel`, for each unit.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in blocks:
                parent.add_module(name, FSDP1Unit(child, **options))
    return FSDP1Unit(_OrFunction(model), **options)


def weights_of(model: nn.Module) -> Weights:
    """How to compute with the weights of a model, which may have been split."""
    if isinstance(model, FSDP1Unit):
        return _Weights1(model)
    return _Weights2(model) if isinstance(model, FSDPModule) else Weights()


class _ShardedWeights(Weights):
    sharded = True
    _within = False  # a forward pass, for which weights have been gathered

    @contextmanager
    def _gathered_once(self) -> Iterator[None]:
        self._within = True
        try:
            yield
        finally:
            self._within = False


class _Weights2(_ShardedWeights):
    """Of FSDP2, which can be told of another forward method."""

    passes_together = True

    def __init__(self, model: Any) -> None:
        self._model = model
        model.computed = _call
        register_fsdp_forward_method(model, "computed")

    def as_forward(self, function: Callable[[], Result]) -> Result:
        if self._within:
            return function()
        with self._gathered_once():
            result: Result = self._model.computed(function)
        if not torch.is_grad_enabled():  # no backward pass lets go of the outermost part
            self._forget_calls()
            self._model.reshard()
        return result

    def in_passes(self, function: Callable[[], Result], as_trained: bool = False) -> Result:
        return self.as_forward(function)

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
            self._forget_calls()
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(part is not self._model, recurse=False)  # the root's are needed again at once

    def _forget_calls(self) -> None:
        # Since torch 2.13; before, the record of forward calls grows until the next backward pass.
        reset: Any = getattr(self._model, "reset_iter_state", None)
        if reset is not None:
            reset()


class _Weights1(_ShardedWeights):
    """Of FSDP1, whose outermost unit calls a function in the place of the model where it is handed one."""

    def __init__(self, model: FSDP1Unit) -> None:
        self._model = model
        self._owners: dict[nn.Module, nn.Module] = {}

    def as_forward(self, function: Callable[[], Result]) -> Result:
        if self._within:
            return function()
        with self._gathered_once():
            result: Result = self._model(computed_by=function)
            return result

    def gathered(self, function: Callable[[], Result], as_trained: bool = False) -> Result:
        flagged = _all_flagged_as_trained(self._model) if as_trained else nullcontext()
        with flagged, FSDP1Unit.summon_full_params(self._model, writeback=False), self._gathered_once():
            return function()

    def shape(self, module: nn.Module, name: str) -> tuple[int, ...]:
        flat = self.owner(module)._handle.flat_param
        shapes = zip(flat._param_infos, flat._shapes, strict=True)
        return next(tuple(shape) for info, shape in shapes if info.module is module and info.param_name == name)

    def owner(self, module: nn.Module) -> Any:
        if not self._owners:
            for unit in FSDP1Unit.fsdp_modules(self._model):  # outer ones first, so that the innermost is left
                self._owners |= dict.fromkeys(unit.modules(), unit)
        return self._owners[module]

    @contextmanager
    def whole(self, owner: nn.Module | None) -> Iterator[None]:
        assert owner is not None
        with FSDP1Unit.summon_full_params(owner, recurse=False, writeback=False):
            yield


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
