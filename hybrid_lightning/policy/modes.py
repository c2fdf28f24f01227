"""Train and eval mode, module by module.

The base model stays in eval mode while it is trained: its own dropout would make the log-probabilities of a training step
differ from those of the policy that sampled, and the ratio of the first minibatch would not be 1. Modules that the adapter
adds are in train mode, so that LoRA's dropout is what its setting says.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hybrid_lightning.engine import Backend


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
