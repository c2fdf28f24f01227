"""`Weights`: ways to compute with a model other than its own `forward`, with weights that may be split over ranks.

FSDP2 gathers the weights of a module before its forward pass, and reduces its gradients after its backward pass, around the call
of the module. The policy computes log-probabilities from parts of the model, so the whole model is called once around them.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

Result = TypeVar("Result")


class Weights:
    """The weights of a model that every rank has in full, so nothing has to be gathered."""

    # Whether weights are split over ranks, which then gather them in each pass and must all make the same number of passes.
    sharded = False

    def as_forward(self, function: Callable[[], Result]) -> Result:
        """Call a function that computes with the model's parts, as if it were the model's forward pass.

        It may also make whole passes. Tensors with gradient must be in its result, alone or in a tuple.
        """
        return function()

    def gathered(self, function: Callable[[], Result]) -> Result:
        """Call a function, without gradient, while every rank holds all weights, so that ranks may compute different things.

        Ranks may also make different numbers of passes.
        """
        return function()


def weights_of(model: nn.Module) -> Weights:
    """The way to compute with the weights of a model, which may have been split."""
    return _SplitWeights(model) if isinstance(model, FSDPModule) else Weights()


class _SplitWeights(Weights):
    """Weights of FSDP2, which accepts a different forward method."""

    sharded = True

    def __init__(self, model: Any) -> None:
        self._model = model
        self._within = False  # whether in a forward pass, for which weights have been gathered
        model.computed = _call
        register_fsdp_forward_method(model, "computed")

    def as_forward(self, function: Callable[[], Result]) -> Result:
        if self._within:
            return function()
        self._within = True
        try:
            result: Result = self._model.computed(function)
        finally:
            self._within = False
        if not torch.is_grad_enabled():  # no backward pass releases the outermost part
            self._forget_calls()
            self._model.reshard()
        return result

    def gathered(self, function: Callable[[], Result]) -> Result:
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


def _call(function: Callable[[], Result]) -> Result:
    return function()
