"""A trained policy out of a module in memory, such as that of a running job."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.export.trained import TrainedPolicy, base_of, training_of
from hybrid_lightning.export.weights import peft_weights


def policy_of_module(
    module: LightningModule, steps: int = 0, summary: Any = None, datamodule: Any = None, keep: bool = True
) -> TrainedPolicy | None:
    """Take plan and trained weights; the module stays as it is.

    Under sharding every process must call this, since shards are gathered one weight at a time.

    Args:
        module: Adapted by a plan, such as a `PolicyModule` after `fit`.
        steps: Optimizer steps taken, for the model card.
        summary: State of a `RunSummary`.
        datamodule: Of the training.
        keep: Take part in gathering and give the policy; without it only take part.

    Raises:
        ConfigError: If the module has no adapter, or does not name its base model.
    """
    plan = getattr(module, "plan", None)
    if plan is None:
        raise ConfigError("cannot export: the module has no adapter, so nothing was trained; give ckpt_path, or fit first")
    arguments: dict[str, Any] = dict(module.hparams)
    base = base_of(arguments)
    state = _gathered(getattr(module, str(module.adapter_attribute)), keep)
    if not keep:
        return None
    return TrainedPolicy(plan, peft_weights(state, plan, "the module"), base, training_of(steps, arguments, summary, datamodule))


def _gathered(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    from hybrid_lightning.adapters.apply import trainable_state  # PEFT is slow to import

    state: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, weight in trainable_state(model).items():
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if keep:
                state[name] = whole.cpu()
    return state
