"""Modes in which a model computes: train or eval mode of each of its modules, gradient checkpointing, and autocast.

The base model stays in eval mode while it is trained: its own dropout would make the log-probabilities of a training step
differ from those of the policy that sampled, and the ratio of the first minibatch would not be 1. Modules that the adapter
adds are in train mode, so that LoRA's dropout is active.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from hybrid_lightning.engine import Backend

_HALF = (torch.bfloat16, torch.float16)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within this context all modules are in eval mode; afterwards those that were in train mode, and no others, are again."""
    trained = [module for module in model.modules() if module.training]
    # `nn.Module.__setattr__` looks for parameters first, which takes long for the hundreds of modules of an adapter.
    for module in trained:
        object.__setattr__(module, "training", False)
    try:
        yield
    finally:
        for module in trained:
            object.__setattr__(module, "training", True)


def checkpoint_gradients(model: nn.Module, backend: Backend) -> None:
    """Recompute the activations of decoder blocks in the backward pass instead of keeping them.

    transformers does so in train mode only. So the blocks, but not the modules in them, are put into train mode.

    Args:
        model: A model of transformers, changed in place.
        backend: The backend of its fused layers.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": backend.recomputed_alike})  # type: ignore[operator]
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def autocast_of(model: nn.Module) -> AbstractContextManager[Any]:
    """Autocast to the dtype of the model's frozen weights, since trained weights are float32; no autocast if all are float32."""
    weight = next(model.parameters())
    return torch.autocast(weight.device.type, weight.dtype) if weight.dtype in _HALF else nullcontext()


def product_dtype(model: nn.Module) -> torch.dtype | None:
    """Dtype of the operands of the model's matrix products under the current autocast; None without autocast."""
    device = next(model.parameters()).device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
