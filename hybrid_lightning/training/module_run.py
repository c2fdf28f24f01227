"""`ModuleRun`: the run of a LightningModule, as its Trainer knows it."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from hybrid_lightning.rollout.run_context import RunContext
from hybrid_lightning.sharding.ranks import check_stop, gather_objects, sum_over_ranks
from hybrid_lightning.training.training_data import restart_epoch


class ModuleRun(RunContext):
    """The run that a module is in; without a Trainer the answers are those of `RunContext`."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self._module = module

    @property
    def _trainer(self) -> Any:
        return self._module._trainer

    @property
    def rank(self) -> int:
        """See `RunContext`."""
        return self._module.global_rank

    @property
    def world_size(self) -> int:
        """See `RunContext`."""
        return 1 if self._trainer is None else int(self._trainer.world_size)

    @property
    def step(self) -> int:
        """See `RunContext`."""
        return 0 if self._trainer is None else int(self._trainer.global_step)

    @property
    def steps_left(self) -> float:
        """See `RunContext`."""
        return float(self._trainer.estimated_stepping_batches) - self.step

    @property
    def accumulate_grad_batches(self) -> int:
        """See `RunContext`."""
        return int(self._trainer.accumulate_grad_batches)

    @property
    def device(self) -> torch.device | None:
        """See `RunContext`."""
        return None if self._trainer is None else self._trainer.strategy.root_device

    @property
    def is_training(self) -> bool:
        """See `RunContext`."""
        return self._trainer is not None and bool(self._trainer.training)

    @property
    def is_resumed(self) -> bool:
        """See `RunContext`."""
        trainer = self._trainer
        return trainer is not None and trainer.state.fn == "fit" and trainer.ckpt_path is not None

    def check_stop(self) -> None:
        """See `RunContext`."""
        check_stop(self.signals, self._module.device)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """See `RunContext`."""
        return sum_over_ranks(values)

    def gather_over_ranks(self, value: Any) -> list[Any]:
        """See `RunContext`."""
        return gather_objects(value)

    def restart_epoch(self) -> None:
        """See `RunContext`."""
        restart_epoch(self._trainer)
