"""Refuse unsupported uses of a strategy, before time is spent on them."""

from collections.abc import Callable, Iterable

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from torch import nn
from torch.optim import Optimizer

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.sharding.checkpoints import is_local
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy


def check_strategy(trainer: Trainer, optimizer: Callable[[Iterable], Optimizer]) -> None:
    """Check that the strategy is supported, and that it works with an optimizer made of parameter groups.

    Raises:
        ConfigError: If it does not work.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy, ParallelStrategy) and not isinstance(strategy, (DDPStrategy, FSDP2Strategy)):
        raise ConfigError(
            f"trainer.strategy={name} is not supported; use ddp if the model, its gradients and the optimizer's state fit one "
            "device, else fsdp, which is FSDP2"
        )
    if not isinstance(strategy, FSDP2Strategy):
        return
    for callback in trainer.checkpoint_callbacks if strategy.writes_folders else ():
        folder = getattr(callback, "dirpath", None)
        if folder is not None and not is_local(folder):
            raise ConfigError(
                f"checkpoint.dirpath={folder} cannot take sharded checkpoints of {name}, which are written and then renamed; "
                "give a folder in a file system that all devices share, or write full checkpoints"
            )
    prompts = getattr(trainer.datamodule, "test_prompts", None) if trainer.state.fn == "predict" else None  # type: ignore[attr-defined]
    if prompts is not None and len(prompts) < trainer.world_size:
        raise ConfigError(
            f"{name} needs at least one prompt per device to predict, got {len(prompts)} for {trainer.world_size} devices; use "
            "fewer devices"
        )
    if trainer.state.fn == "fit":
        check_optimizer(optimizer, name)


def check_optimizer(optimizer: Callable[[Iterable], Optimizer], strategy: str) -> None:
    """Check that a strategy can split the state of an optimizer, made of parameter groups, over devices.

    Raises:
        ConfigError: If it cannot be split.
    """
    group = {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.0, "name": "check"}
    kind = type(optimizer([group]))
    if kind.__module__.startswith("bitsandbytes"):
        raise ConfigError(
            f"model.optimizer={kind.__name__} does not work with {strategy}, which splits its state over devices; use "
            "torch.optim.AdamW or trainer.strategy=ddp"
        )
