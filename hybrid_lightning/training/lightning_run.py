"""`LightningRun`: the run of a module's Trainer."""

# The base class, `Run`, documents the values; there, they are not read from a Trainer but plain.
# mypy: disable-error-code="override"
# ruff: noqa: D102

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from torch import Tensor

from hybrid_lightning.training.lightning_internals import forget_metrics, train_batches
from hybrid_lightning.training.run import Run


class LightningRun(Run):
    """The run of a module's Trainer; until the module has one, the plain `Run`."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self._module = module

    @property
    def _trainer(self) -> Trainer | None:
        return self._module._trainer

    @property
    def stage(self) -> str:
        return "" if self._trainer is None or self._trainer.state.fn is None else self._trainer.state.fn.value

    @property
    def rank(self) -> int:
        return super().rank if self._trainer is None else self._trainer.global_rank

    @property
    def world_size(self) -> int:
        return super().world_size if self._trainer is None else self._trainer.world_size

    @property
    def device(self) -> torch.device | None:
        return None if self._trainer is None else self._trainer.strategy.root_device

    @property
    def step(self) -> int:
        return super().step if self._trainer is None else self._trainer.global_step

    @property
    def steps_left(self) -> float:
        trainer = self._trainer
        return super().steps_left if trainer is None else trainer.estimated_stepping_batches - trainer.global_step

    @property
    def accumulate_grad_batches(self) -> int:
        return super().accumulate_grad_batches if self._trainer is None else self._trainer.accumulate_grad_batches

    @property
    def is_training(self) -> bool:
        return self._trainer is not None and self._trainer.training

    @property
    def is_resumed(self) -> bool:
        return self.stage == "fit" and self._module.trainer.ckpt_path is not None

    @property
    def scales_loss(self) -> bool:
        return self._trainer is not None and getattr(self._trainer.precision_plugin, "scaler", None) is not None

    @property
    def restarts_epochs(self) -> str:
        trainer: Any = self._trainer
        if trainer is not None and trainer.overfit_batches:
            return "trainer.overfit_batches restarts each epoch"
        reloads = trainer is not None and trainer.reload_dataloaders_every_n_epochs
        return "trainer.reload_dataloaders_every_n_epochs would drop the rollouts that were begun" if reloads else ""

    @property
    def ends_by_clock(self) -> bool:
        trainer: Any = self._trainer
        return trainer is not None and any(isinstance(callback, Timer) for callback in trainer.callbacks)

    def restart_epoch(self) -> None:
        """Make a resumed run count the micro-batches of its epoch from 0, while Lightning loads the train dataloader's state.

        The number of micro-batches has changed: with the old count, the epoch would end, or the optimizer would step, in the
        middle of a step's micro-batches. Counts over all epochs stay.
        """
        progress = self._module.trainer.fit_loop.epoch_loop.batch_progress
        total, current = cast(Any, progress.total), cast(Any, progress.current)
        count = train_batches(self._module.trainer) if progress.is_last_batch else 0  # a finished epoch stays finished
        current.ready = current.started = current.processed = count
        # A checkpoint saved in a micro-batch's last hook does not count that micro-batch as completed; Lightning then adds it.
        current.completed = count - (total.processed - total.completed)

    def backward(self, loss: Tensor) -> None:
        with torch.autocast(loss.device.type, enabled=False):
            self._module.trainer.strategy.backward(loss, None)
        torch.clear_autocast_cache()

    def clear_gradients(self) -> None:
        optimizer: Any = self._module.optimizers(use_pl_optimizer=False)  # there is only one
        optimizer.zero_grad()

    def log(self, values: Mapping[str, Any], shown: Sequence[str] = (), rows: int = 1) -> None:
        options: dict[str, Any] = {"on_step": True, "on_epoch": False, "batch_size": rows}
        in_bar = {name: values[name] for name in shown if name in values}
        self._module.log_dict(in_bar, prog_bar=True, **options)
        self._module.log_dict({name: value for name, value in values.items() if name not in in_bar}, **options)

    def log_evaluation(self, values: Mapping[str, float]) -> None:
        self._module.log_dict(dict(values), sync_dist=self.world_size > 1)

    def forget(self, names: Sequence[str]) -> None:
        forget_metrics(self._module.trainer, names)
