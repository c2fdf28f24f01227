"""`Backend`: by what the passes of one model are computed: our operators and oneDNN on a CPU, torch elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from hybrid_lightning.engine.cpu import operators
from hybrid_lightning.engine.cpu.products import prepacked_product


class Backend:
    """Says what there is for some tensors, and what pays on a device.

    The fused layers of a model use operators while a pass of the engine runs, and at no other time: called by itself a model
    computes what transformers does, bit for bit, and operators sum up in another order.
    """

    def __init__(self) -> None:
        self._in_pass = False

    @contextmanager
    def in_pass(self, value: bool = True) -> Iterator[None]:
        """Within this context a pass of the engine runs, or none does."""
        before, self._in_pass = self._in_pass, value
        try:
            yield
        finally:
            self._in_pass = before

    def recomputed_alike(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The `context_fn` of a checkpoint whose forward pass, made again in the backward pass, is to use the same operators."""
        return nullcontext(), self.in_pass(self._in_pass)

    def usable(self, *tensors: Tensor) -> bool:
        """Whether there are operators for these tensors."""
        return operators.usable(*tensors)

    def usable_in_layers(self, *tensors: Tensor) -> bool:
        """Whether a fused layer may use operators for these tensors now."""
        return self._in_pass and self.usable(*tensors)

    def products_are_faster(self, device: torch.device) -> bool:
        """Whether matrix products beat torch's fused kernels of attention, at the lengths of rollouts."""
        return device.type == "cpu"

    def key_dtype(self, key: Tensor) -> torch.dtype:
        """The dtype to keep keys in that many later calls will use: the one that they would else be converted to every time."""
        return torch.float32 if self.products_are_faster(key.device) else key.dtype

    def copies_pay(self, device: torch.device) -> bool:
        """Whether decoding is so much faster by a copy of the weights, made for its products, that it is worth the memory."""
        return device.type == "cpu"

    def prepacked_product(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """The product with a weight [m, n] that does not change: from rows [N, n] to [N, m], without a gradient."""
        return prepacked_product(weight)
