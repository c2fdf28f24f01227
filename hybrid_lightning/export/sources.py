"""Sources of a `TrainedPolicy`: a checkpoint, or a module in memory, such as in a running job.

A checkpoint may be a file, or the folder of a sharded checkpoint, whatever strategy wrote it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.errors import CheckpointError, ConfigError
from hybrid_lightning.export.trained import TrainedPolicy, base_model_of, is_adapter_weight, peft_weights, training_of
from hybrid_lightning.sharding.checkpoints import read_checkpoint
from hybrid_lightning.sharding.sharded_folder import read_weights
from hybrid_lightning.training.checkpoint import adapter_state


def policy_of_checkpoint(path: str | Path, arguments: Mapping[str, Any] | None = None, datamodule: Any = None) -> TrainedPolicy:
    """Read plan and trained weights from a checkpoint, in one process, whatever number of processes wrote it.

    Args:
        path: File or folder of the checkpoint.
        arguments: Constructor arguments of the module that replace the ones in the checkpoint, such as `model` if the base model
            has moved.
        datamodule: Data module of the training, for the model card.

    Raises:
        CheckpointError: If the checkpoint does not exist, or has no adapter.
        ConfigError: If neither the checkpoint nor `arguments` names the base model.
    """
    path = Path(path)
    content = read_checkpoint(path)
    saved = adapter_state(content)["plan"]
    if saved is None:
        raise CheckpointError(f"{path} was saved without an adapter, so it has no trained weights; give another checkpoint")
    plan = AdapterPlan.from_dict(saved, source=str(path))
    state = (read_weights(path, is_adapter_weight) if path.is_dir() else content)["state_dict"]
    # Lightning stores the module's constructor arguments under this name.
    trained_with = content.get("hyper_parameters", {})
    summary = content.get("callbacks", {}).get("RunSummary")
    return TrainedPolicy(
        plan=plan,
        weights=peft_weights(state, plan, str(path)),
        base=base_model_of({**trained_with, **(arguments or {})}),
        training=training_of(content.get("global_step", 0), trained_with or arguments or {}, summary, datamodule),
    )


def policy_of_module(
    module: LightningModule, steps: int = 0, summary: Any = None, datamodule: Any = None, keep: bool = True
) -> TrainedPolicy | None:
    """Take plan and trained weights from a module, which is not changed.

    Under sharding every process must call this, since shards are gathered one weight at a time.

    Args:
        module: Module adapted by a plan, such as a `PolicyModule` after `fit`.
        steps: Optimizer steps taken, for the model card.
        summary: State of a `RunSummary`, for the model card.
        datamodule: Data module of the training, for the model card.
        keep: Whether this process needs the policy; if not, it only helps to gather the weights.

    Returns:
        The policy, or None without `keep`.

    Raises:
        ConfigError: If the module has no adapter, or does not name its base model.
    """
    from hybrid_lightning.adapters.apply import trainable_state  # PEFT is slow to import

    plan = getattr(module, "plan", None)
    if plan is None:
        raise ConfigError("cannot export: the module has no adapter, so nothing was trained; give ckpt_path, or call fit first")
    arguments: dict[str, Any] = dict(module.hparams)
    base = base_model_of(arguments)
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, weight in trainable_state(getattr(module, str(module.adapter_attribute))).items():
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if keep:
                state[name] = whole.cpu()
    if not keep:
        return None
    return TrainedPolicy(plan, peft_weights(state, plan, "the module"), base, training_of(steps, arguments, summary, datamodule))
