"""What an optimizer keeps for each number that it trains, found out by letting it train a few."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.policy.optim import OptimizerCallable, make_optimizer

_SHAPE = (64, 4096)  # bitsandbytes keeps 8 bits for tensors of 4,096 numbers or more


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes for each trained number."""

    state: float
    step: float  # more while it makes a step on an accelerator, where it updates all tensors together


def optimizer_bytes(optimizer: OptimizerCallable, dtype: torch.dtype = torch.float32) -> OptimizerBytes:
    """Make one step.

    Args:
        optimizer: Called with parameter groups, as by the policy.
        dtype: Of what it trains.

    Raises:
        ConfigError: If it cannot make a step on a CPU.
    """
    parameter = nn.Parameter(torch.zeros(_SHAPE, dtype=dtype))
    try:
        built = make_optimizer(optimizer, [{"params": [parameter], "lr": 0.0, "name": "full"}])
        parameter.grad = torch.ones_like(parameter)
        built.step()
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"model.optimizer cannot be planned for: {' '.join(str(error).split())[:300]}") from error
    kept = [
        value for state in built.state.values() for value in state.values() if isinstance(value, Tensor) and value.numel() > 1
    ]
    # torch's own compute all denominators at once, if not told otherwise; of bfloat16 weights only some at a time.
    alone = (
        built.defaults.get("fused") or built.defaults.get("foreach") is False or not type(built).__module__.startswith("torch.")
    )
    return OptimizerBytes(
        state=sum(value.untyped_storage().nbytes() for value in kept) / parameter.numel(), step=0.0 if alone else 4.0
    )
