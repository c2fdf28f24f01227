"""`ModelCheckpoint`: Lightning's callback, except that `last.ckpt` is always the checkpoint of the last step."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint as LightningModelCheckpoint


class ModelCheckpoint(LightningModelCheckpoint):
    """Lightning's callback, which with `save_last` keeps the newest weights and not only the best.

    Lightning 2.6 writes `last.ckpt` only if the monitored metric is good enough for a checkpoint of its own. After a run that did
    not get better, it would hold the weights of an earlier step than the accuracy that the run reports, and a killed run would
    lose everything after its best validation. Here it is written at each validation (or as `every_n_train_steps` says) and at the
    end of the run. `save_last: link` works as in Lightning.
    """

    _step_of_last = -1  # step for which this process has written `last.ckpt`

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        if self._last_global_step_saved != trainer.global_step:  # else Lightning writes the last one next
            self._save_last_checkpoint(trainer, monitor_candidates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, unless it has been saved."""
        super().on_train_end(trainer, pl_module)
        if self.save_last is True:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # which writes nothing; Lightning's on_train_end would
            return
        if self.save_last == "link" or self._step_of_last != trainer.global_step:
            self._step_of_last = trainer.global_step
            super()._save_last_checkpoint(trainer, monitor_candidates)
