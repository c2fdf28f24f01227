"""Weights that are computed directly into their destination, and loading them into an engine in this process."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hybrid_lightning.rollout.interface import PolicyWeight


class Deferred(torch.Tensor):
    """A weight that is computed when it is copied, directly into the destination.

    vLLM collects the parts of a joined layer until it has all, allocates the layer, and copies the parts into it. With ordinary
    tensors there would be two copies of the layer in addition to the engine's own; here there is one.
    """

    _weight: PolicyWeight
    _first: int

    @staticmethod
    def of(weight: PolicyWeight, first: int = 0, rows: int | None = None) -> "Deferred":
        """Some rows of a weight."""
        shape = weight.shape if rows is None else torch.Size([rows, *weight.shape[1:]])
        tensor: Any = torch.Tensor._make_wrapper_subclass(Deferred, shape, dtype=torch.float32)
        tensor._weight, tensor._first = weight, first
        return tensor

    def computed(self) -> Tensor:
        """Its values."""
        values = torch.empty(self.shape, dtype=torch.float32)
        self._weight.write_rows(values, self._first)
        return values

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as a method of instances
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        ops = torch.ops.aten
        if function is ops.copy_.default and isinstance(arguments[1], cls):
            destination, source = arguments[0], arguments[1]
            if not destination.is_meta:  # vLLM counts the coming weights on meta tensors
                assert destination.shape == source.shape, f"{source._weight.name}: {source.shape} into {destination.shape}"
                source._weight.write_rows(destination, source._first)
            return destination
        if function in (ops.detach.default, ops.alias.default):
            return cls.of(arguments[0]._weight, arguments[0]._first, len(arguments[0]))
        if function is ops.slice.Tensor and (len(arguments) < 2 or arguments[1] == 0) and len(arguments) < 5:
            source = arguments[0]
            start, end = [*arguments[2:], None, None][:2]
            first, last, _ = slice(start, end).indices(len(source))
            return cls.of(source._weight, source._first + first, last - first)
        given = (arguments, options or {})
        arguments, options = tree_map(lambda value: value.computed() if isinstance(value, cls) else value, given)
        return function(*arguments, **options)


def load(worker: Any, weights: Iterator[tuple[str, Tensor]], everything: bool) -> None:
    """Load weights in an engine's worker (see `load_weights`)."""
    from vllm.config import set_current_vllm_config

    from hybrid_lightning.rollout.vllm.receiver import load_weights

    with set_current_vllm_config(worker.vllm_config):
        load_weights(worker.model_runner.model, worker.model_runner.model_config, weights, everything)
