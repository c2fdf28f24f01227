"""How a model computes: eval or train mode of each module, gradient checkpointing, and precision.

The base model stays in eval mode while it is trained: its own dropout would make the log-probabilities of a training step
differ from those of the policy that sampled, and the ratio of the first minibatch would not be 1. Modules that the adapter
adds are in train mode, so that LoRA's dropout is active.

These values of `trainer.precision` work for a policy:

| trainer.precision | model.dtype       | trained weights, gradients | matrix products                     |
|-------------------|-------------------|----------------------------|-------------------------------------|
| `32-true`         | float32           | float32                    | float32                             |
| `bf16-mixed`      | float32, bfloat16 | float32                    | bfloat16, by autocast               |
| `bf16-true`       | bfloat16          | bfloat16                   | bfloat16, without autocast          |
| `16-mixed`        | float32, float16  | float32                    | float16, by autocast                |

Under `16-mixed` the loss is scaled, so that small gradients do not vanish; if a gradient becomes too large for float16, all
processes skip the step. On a CPU Lightning replaces it by `bf16-mixed`; with FSDP2 Lightning takes it as a plugin only:

    --trainer.plugins=lightning.pytorch.plugins.MixedPrecision --trainer.plugins.precision=16-mixed --trainer.plugins.device=cuda

Losses, log-probabilities, attention scores and the optimizer's moments are float32 under all of them. Under `bf16-true`, too, no
step is rounded off (see `MasterWeights`). It is less exact than `bf16-mixed` in one thing: the gradients of an optimizer step are
added up in bfloat16, over its forward and backward passes and over processes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.optim import Optimizer

from hybrid_lightning.engine import Backend
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.sharding.ranks import total_norm

_BFLOAT16 = "bf16-true"
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


class Bfloat16Precision(Precision):
    """`bf16-true` for a model that is loaded in bfloat16.

    Lightning's own plugin would make every new tensor bfloat16, and convert each batch to it. Advantages and log-probabilities,
    from whose differences a policy learns, would be rounded to three digits.
    """

    precision = "bf16-true"

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clip gradients by their norm, which is computed in float32."""
        weights = [weight for weight in self.main_params(optimizer) if weight.grad is not None]
        if weights:
            norm = total_norm([weight.grad for weight in weights if weight.grad is not None], weights[0].device)
            torch.nn.utils.clip_grads_with_norm_(weights, clip_val, norm)


def use_bfloat16_precision(strategy: Strategy) -> None:
    """Replace Lightning's plugin for `bf16-true` in a strategy by `Bfloat16Precision`."""
    plugin = strategy.precision_plugin
    if isinstance(plugin, HalfPrecision) and plugin.precision == _BFLOAT16:
        strategy.precision_plugin = Bfloat16Precision()


def dtype_of_precision(precision: str) -> torch.dtype:
    """Dtype of the trained weights under a precision of the Trainer."""
    return torch.bfloat16 if precision == _BFLOAT16 else torch.float32


def check_precision(precision: str, dtype: str, optimizer: Callable[[Iterable], Optimizer]) -> None:
    """Raise ConfigError unless the Trainer's precision, the dtype in which the model is loaded, and the optimizer fit."""
    if precision == "16-true":
        raise ConfigError(
            "trainer.precision=16-true is not supported: small gradients vanish in float16; use 16-mixed, which scales the loss, "
            "or bf16-true"
        )
    if precision not in ("32-true", _BFLOAT16) and not precision.endswith("-mixed"):
        raise ConfigError(
            f"trainer.precision={precision} is not supported: rollouts and losses are float32; use 32-true or bf16-mixed"
        )
    if precision == _BFLOAT16 and dtype != "bfloat16":
        raise ConfigError(f"trainer.precision=bf16-true needs model.dtype=bfloat16, got model.dtype={dtype}; or use bf16-mixed")
    if dtype != "float32" and precision == "32-true":
        fitting = "16-mixed" if dtype == "float16" else "bf16-mixed (trained weights are float32) or bf16-true (all are bfloat16)"
        raise ConfigError(f"model.dtype={dtype} needs trainer.precision={fitting}, got trainer.precision={precision}")
    if precision == "16-mixed":
        built = optimizer([{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.0, "name": "check"}])
        if getattr(built, "_step_supports_amp_scaling", False):
            raise ConfigError(
                "model.optimizer.fused=true does not work with trainer.precision=16-mixed: it takes the scale from gradients in "
                "its step, after they have been clipped; set it to false, or use bf16-mixed"
            )
