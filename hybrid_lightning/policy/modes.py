"""How a model computes: train or eval mode, module by module, and the precision.

The base model stays in eval mode while it is trained: its own dropout would make the log-probabilities of a training step
differ from those of the policy that sampled, and the ratio of the first minibatch would not be 1. Modules that the adapter
adds are in train mode, so that LoRA's dropout is what its setting says.
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
    """Eval mode for all modules; afterwards each is in its own mode again, which `model.train(flag)` would not do."""
    trained = [module for module in model.modules() if module.training]
    # Not by the modules' own way to set attributes, which looks for parameters first: an adapter has hundreds of modules.
    for module in trained:
        object.__setattr__(module, "training", False)
    try:
        yield
    finally:
        for module in trained:
            object.__setattr__(module, "training", True)


def checkpoint_gradients(model: nn.Module, backend: Backend) -> None:
    """Recompute the activations of decoder blocks in the backward pass instead of keeping them.

    Transformers honours this in train mode only, so the blocks themselves, but not the modules in them, are put into it.

    Args:
        model: Of transformers.
        backend: Of its fused layers.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": backend.recomputed_alike})  # type: ignore[operator]
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def precision_of(model: nn.Module) -> AbstractContextManager[Any]:
    """Autocast to the dtype of the model's frozen weights, beside which trained weights are float32; nothing for float32."""
    weight = next(model.parameters())
    return torch.autocast(weight.device.type, weight.dtype) if weight.dtype in _HALF else nullcontext()


def product_dtype(model: nn.Module) -> torch.dtype | None:
    """What autocast makes of the operands of matrix products; None without it."""
    device = next(model.parameters()).device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
