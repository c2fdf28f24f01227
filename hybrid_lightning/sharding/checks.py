"""Refuse what a strategy cannot do, before time is spent on it."""

from collections.abc import Callable, Iterable

import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from torch import nn
from torch.optim import Optimizer

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.sharding.fsdp1 import FSDP1Strategy
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy

_OURS = (FSDP2Strategy, FSDP1Strategy)
NOTHING_TO_SPLIT = (
    "FSDP1Strategy has nothing to split on one device, and torch cannot save what it leaves whole; use trainer.strategy=auto, "
    "more devices, or --config configs/strategy/fsdp2.yaml"
)


def check_strategy(trainer: Trainer, optimizer: Callable[[Iterable], Optimizer], dtype: str) -> None:
    """Check that strategy, precision and dtype of a model work together, and with the optimizer that is made of parameter groups.

    Raises:
        ConfigError: If they do not work together.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy, ParallelStrategy) and not isinstance(strategy, (DDPStrategy, *_OURS)):
        raise ConfigError(
            f"trainer.strategy={name} is not supported: rollouts and checkpoints need what ours do; use ddp where the model, its "
            "gradients and the optimizer's state fit one device, else --config configs/strategy/fsdp2.yaml"
        )
    if not isinstance(strategy, _OURS):
        return
    for callback in trainer.checkpoint_callbacks if strategy.writes_folders else ():
        folder = getattr(callback, "dirpath", None)
        if folder is not None and not _is_local_file_protocol(folder):
            raise ConfigError(
                f"checkpoint.dirpath={folder} cannot take sharded checkpoints of {name}, which are put in place by renaming; "
                "give a folder in a file system that all devices share, or write full checkpoints"
            )
    if isinstance(strategy, FSDP1Strategy) and trainer.world_size == 1:
        raise ConfigError(NOTHING_TO_SPLIT)
    if isinstance(strategy, FSDP1Strategy) and dtype != "float32" and str(trainer.precision) != "bf16-true":
        raise ConfigError(
            f"model.dtype={dtype} does not work with FSDP1Strategy and trainer.precision={trainer.precision}: trained weights "
            "are float32, and FSDP1 wants one dtype in a block; use trainer.precision=bf16-true, where all are bfloat16, "
            "model.dtype=float32, or --config configs/strategy/fsdp2.yaml"
        )
    prompts = getattr(trainer.datamodule, "test_prompts", None) if trainer.state.fn == "predict" else None  # type: ignore[attr-defined]
    if prompts is not None and len(prompts) < trainer.world_size:
        raise ConfigError(
            f"{len(prompts)} prompts cannot be predicted on {trainer.world_size} devices by {name}, which need one "
            "each; use fewer devices"
        )
    if trainer.state.fn == "fit":
        check_optimizer(optimizer, name)


def check_optimizer(optimizer: Callable[[Iterable], Optimizer], strategy: str) -> None:
    """Check that the state of an optimizer, which is made of parameter groups, can be split over devices by a strategy.

    Raises:
        ConfigError: If it cannot be split.
    """
    group = {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.0, "name": "check"}
    kind = type(optimizer([group]))
    if kind.__module__.startswith("bitsandbytes"):
        raise ConfigError(
            f"model.optimizer={kind.__name__} cannot hold the state of weights that {strategy} splits over devices; use "
            "torch.optim.AdamW, whose state is split as well, or trainer.strategy=ddp"
        )
