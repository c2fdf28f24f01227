"""`ModelCheckpoint`: Lightning's, whose `last.ckpt` is that of the last step."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint as LightningModelCheckpoint


class ModelCheckpoint(LightningModelCheckpoint):
    """Lightning's callback, which with `save_last` keeps the newest weights and not only the best.

    Lightning 2.6 writes `last.ckpt` only where the monitored metric is good enough for a checkpoint of its own: after a run that
    got no better, it would hold the weights of an earlier step than the accuracy that the run reports, and a killed run would
    lose whatever came after its best validation. Here each validation (or whatever `every_n_train_steps` says) and the end of the
    run write it. `save_last: link` stays Lightning's.
    """

    _step_of_last = -1  # for which this process has written it

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        if self._last_global_step_saved != trainer.global_step:  # else Lightning writes the last one next
            self._save_last_checkpoint(trainer, monitor_candidates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, unless it has been."""
        super().on_train_end(trainer, pl_module)
        if not trainer.fast_dev_run and self.save_last is True:  # type: ignore[attr-defined]
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        if self.save_last == "link" or self._step_of_last != trainer.global_step:
            self._step_of_last = trainer.global_step
            super()._save_last_checkpoint(trainer, monitor_candidates)
