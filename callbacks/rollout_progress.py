"""`RolloutProgress`: Lightning's progress bar with a second bar for the generation of completions."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class RolloutProgress(RichProgressBar):
    """Shows reward and completion length beside the training bar, and the tokens decoded while a rollout is generated."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10)
        self._generation_task: Any = None

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches of this epoch, no more than `max_steps` allows."""
        of_epoch = self.trainer.num_training_batches
        if self.trainer.max_steps < 0:
            return of_epoch
        done = (self.trainer.fit_loop.batch_idx + 1) % of_epoch  # at an epoch's start Lightning still counts the one before
        left = (self.trainer.max_steps - self.trainer.global_step) * self.trainer.accumulate_grad_batches
        return min(of_epoch, done + left)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to the generation."""
        super().setup(trainer, pl_module, stage)
        listeners = getattr(pl_module, "generation_listeners", None)
        if listeners is not None and self._show_generation not in listeners:
            listeners.append(self._show_generation)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Without the version number of the run folder."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)  # type: ignore[assignment]
        metrics.pop("v_num", None)
        return metrics

    def _get_train_description(self, current_epoch: int) -> str:
        """Lightning's "Epoch 0/-2" says nothing where `max_steps` ends the run."""
        return f"Training (epoch {current_epoch})"

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        super().teardown(trainer, pl_module, stage)
        listeners = getattr(pl_module, "generation_listeners", [])
        if self._show_generation in listeners:
            listeners.remove(self._show_generation)

    def _show_generation(self, running: int, decoded: int, total: int) -> None:
        if self.progress is None or self._progress_stopped or self.is_disabled:
            return
        if self._generation_task not in self.progress.task_ids:
            self._generation_task = self._add_task(total, "Generating")
        done = running == 0 or decoded == total
        self.progress.update(self._generation_task, completed=decoded, total=total, visible=not done)
