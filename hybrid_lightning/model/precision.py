"""Modes of a model: eval or train mode of each module, gradient checkpointing, and precision.

The base model stays in eval mode during training: its own dropout would make the log-probabilities of a training step differ from
the sampling policy's, and the ratio of the first minibatch would not be 1. Modules that the adapter adds are in train mode, so
that LoRA's dropout is active.

These values of `trainer.precision` work for a policy. Trained weights and gradients are always float32:

| trainer.precision | model.dtype       | matrix products         |
|-------------------|-------------------|-------------------------|
| `32-true`         | float32           | float32                 |
| `bf16-mixed`      | float32, bfloat16 | bfloat16, by autocast   |
| `16-mixed`        | float32, float16  | float16, by autocast    |

`model.dtype` is the dtype of frozen weights. Under `16-mixed` the loss is scaled, so that small gradients do not vanish; if a
gradient becomes too large for float16, all processes skip the step. On a CPU Lightning replaces `16-mixed` by `bf16-mixed`; with
FSDP2 Lightning accepts it only as a plugin:

    --trainer.plugins=lightning.pytorch.plugins.MixedPrecision --trainer.plugins.precision=16-mixed --trainer.plugins.device=cuda

Losses, log-probabilities, attention scores and the optimizer's moments are float32 under all three.

A CPU without instructions for bfloat16 takes 4 to 60 times as long for 16-bit products as for float32 products. On such a CPU
products are computed in float32 under all three, and frozen 16-bit weights become float32 in memory, with the same values: the
numbers are the same as with autocast, except for its rounding (see `Policy.precision`).
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.runner import HALF, Backend, accelerator_memory, why_no_halves
from hybrid_lightning.sharding.ranks import world_size

_MOST = 0.5  # share of the machine's memory that weights in float32 may take


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put all modules in eval mode within this context; afterwards exactly the modules that were in train mode return to it."""
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

    transformers does so only in train mode. So the blocks, but not the modules in them, are put into train mode.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": backend.recomputed_alike})  # type: ignore[operator]
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def autocast_of(model: nn.Module) -> AbstractContextManager[Any]:
    """Autocast to the dtype of the model's frozen weights, since trained weights are float32; no autocast if all are float32."""
    weight = next(model.parameters())
    return torch.autocast(weight.device.type, weight.dtype) if weight.dtype in (torch.bfloat16, torch.float16) else nullcontext()


def why_float32(model: nn.Module) -> str:
    """Why a CPU should compute a model's 16-bit products in float32, worded for the user; empty if it should not."""
    reason, memory = why_no_halves(), memory_of(torch.device("cpu"))
    needed = 4 * sum(parameter.numel() for parameter in model.parameters()) * world_size()
    if not reason or memory is None or needed <= _MOST * memory:
        return reason
    rank_zero_warn(
        f"{reason}, so products take 4 to 60 times as long as in float32, but float32 weights of {needed / 2**30:.1f} GiB do "
        f"not fit into half of this machine's {memory / 2**30:.1f} GiB; use a smaller model or another machine"
    )
    return ""


def widen(model: nn.Module) -> None:
    """Convert all 16-bit weights and buffers to float32, in place, one after another; their values stay the same."""
    for part in (*model.parameters(), *model.buffers()):
        if part.dtype in HALF:
            part.data = part.data.float()


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory of a GPU, or of this machine for a CPU; None if unknown."""
    if device.type == "cpu":
        with suppress(AttributeError, ValueError, OSError):  # not on Windows
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return None
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return accelerator_memory(device) if torch.cuda.is_available() else None


def check_precision(precision: str, dtype: str, optimizer: Callable[[Iterable], Optimizer]) -> None:
    """Raise ConfigError unless the Trainer's precision, the dtype for loading the model, and the optimizer fit together."""
    if precision != "32-true" and not precision.endswith("-mixed"):
        raise ConfigError(
            f"trainer.precision={precision} is not supported: trained weights, gradients and losses are float32, since small "
            "steps vanish in 16 bits; use bf16-mixed (with model.dtype=bfloat16 frozen weights take half the memory), 16-mixed "
            "or 32-true"
        )
    if dtype != "float32" and precision == "32-true":
        fitting = "16-mixed" if dtype == "float16" else "bf16-mixed"
        raise ConfigError(f"model.dtype={dtype} needs trainer.precision={fitting}, got trainer.precision={precision}")
    if precision == "16-mixed":
        built = optimizer([{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.0, "name": "check"}])
        if getattr(built, "_step_supports_amp_scaling", False):
            raise ConfigError(
                "model.optimizer.fused=true does not work with trainer.precision=16-mixed: it takes the scale from gradients in "
                "its step, after they have been clipped; set it to false, or use bf16-mixed"
            )
