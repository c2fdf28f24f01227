"""`ModelCheckpoint`: Lightning's callback, except that `last.ckpt` is always the last step, and ties are broken."""

import math
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint as LightningModelCheckpoint
from torch import Tensor

from hybrid_lightning.callbacks.display import say
from hybrid_lightning.callbacks.evaluation_report import OF_VALIDATION
from hybrid_lightning.reports.verdict import REWARD
from hybrid_lightning.training.evaluation import ACCURACY
from hybrid_lightning.training.module import LanguageModule


class ModelCheckpoint(LightningModelCheckpoint):
    """Lightning's callback, except that `save_last` keeps the newest weights, not only the best.

    Lightning 2.6 writes `last.ckpt` only if the monitored metric is good enough for a checkpoint of its own. After a run without
    improvement, `last.ckpt` would hold weights from an earlier step than the reported accuracy, and a killed run would lose
    everything after its best validation. Here it is written at each validation and at the end of the run. If
    `every_n_train_steps` or `train_time_interval` is set, it is written whenever that is due, and the next validation decides
    about the best. `save_last: link` works as in Lightning.

    Where no part of the reward measures correctness, there is no accuracy to monitor: `val/reward` takes its place.

    Among checkpoints with the same value of the monitored metric, the best has the highest `val/reward`; if that is equal too,
    the latest is best. A resumed run continues with the best checkpoints of the run that it resumes.
    """

    _step_of_last = -1  # step for which this process has written `last.ckpt`
    _rewards: Mapping[str, float] = {}  # path of each of the best checkpoints -> its `val/reward`

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose what to monitor, before a checkpoint restores the best ones."""
        self.monitor_what_is_measured(trainer, pl_module)
        super().setup(trainer, pl_module, stage)

    def monitor_what_is_measured(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Monitor the reward in place of an accuracy that the module does not measure, and print that."""
        generation = pl_module.task.generation if isinstance(pl_module, LanguageModule) else None
        if generation is None or generation.reward is None or generation.measures_correctness or self.monitor is None:
            return
        sets, _, metric = self.monitor.rpartition("/")
        if sets.startswith("val") and ACCURACY.fullmatch(metric):
            before, self.monitor = self.monitor, f"{sets}/reward"
            if trainer.is_global_zero and trainer.state.fn == "fit":
                why = f"since no part of the reward measures correctness, and there is no {before}"
                say(f"The best checkpoint is chosen by {self.monitor}, {why}")

    # ---- when

    @property
    def _waits(self) -> bool:
        """Whether checkpoints are due at steps or times while only validation yields the monitored metric."""
        return self._every_n_epochs < 1 and self.monitor is not None and OF_VALIDATION.match(self.monitor) is not None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if nothing can be written when it is due."""
        super().on_train_start(trainer, pl_module)
        if self._waits and self.save_last is not True and trainer.is_global_zero:
            what = f"checkpoint.monitor={self.monitor} is known after validations alone"
            say(f"Warning: no checkpoint is written between validations, since {what}; set checkpoint.save_last=true")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write what is due. Lightning would wait for a validation metric, and then use the value of an earlier step."""
        if not self._waits:
            return super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        now, steps, interval = time.monotonic(), self._every_n_train_steps, self._train_time_interval
        due = steps > 0 and trainer.global_step % steps == 0
        if interval is not None and self._last_time_checked is not None:
            due = trainer.strategy.broadcast(now - self._last_time_checked >= interval.total_seconds())  # clocks of ranks differ
        if due and not self._should_skip_saving_checkpoint(trainer):
            self._last_time_checked, self._defer_save_until_validation = now, True
            if self.save_last is True:
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what this validation decides, even if `last.ckpt` has already been written at this step."""
        if self._defer_save_until_validation:
            self._last_global_step_saved = self._step_of_last = -1
        super().on_validation_end(trainer, pl_module)

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        return not self._waits and super()._should_save_on_train_epoch_end(trainer)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        if self._last_global_step_saved != trainer.global_step:  # if equal, Lightning writes the last one next
            self._save_last_checkpoint(trainer, monitor_candidates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step unless it is already saved."""
        super().on_train_end(trainer, pl_module)
        if self.save_last is True:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # writes nothing, but Lightning's on_train_end would
            return
        if self.save_last == "link" or self._step_of_last != trainer.global_step:
            self._step_of_last = trainer.global_step
            super()._save_last_checkpoint(trainer, monitor_candidates)

    # ---- the best checkpoint

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether to keep a checkpoint with this value of the monitored metric; it need not be better than the worst."""
        if super().check_monitor_top_k(trainer, current):
            return True
        worst = self.best_k_models.get(self.kth_best_model_path)
        tied = current is not None and worst is not None and bool(current == worst)
        tied = tied and _reward(trainer) >= self._rewards.get(self.kth_best_model_path, -math.inf)
        return trainer.strategy.reduce_boolean_decision(tied)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if filepath in self.best_k_models:  # Lightning has just added it, and keeps the first of equal ones
            known = {**self._rewards, filepath: _reward(trainer)}
            self._rewards = {path: known.get(path, -math.inf) for path in self.best_k_models}
            sign = 1 if self.mode == "max" else -1
            order = sorted(self.best_k_models, key=lambda path: (sign * float(self.best_k_models[path]), self._rewards[path]))
            self.kth_best_model_path, self.best_model_path = order[0], order[-1]
            self.kth_value, self.best_model_score = self.best_k_models[order[0]], self.best_k_models[order[-1]]
        super()._save_checkpoint(trainer, filepath)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state, and the rewards of the best checkpoints."""
        return {**super().state_dict(), "rewards": self._rewards}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best checkpoints, which stay in the folder of the resumed run."""
        last = self.last_model_path if self.dirpath != state_dict["dirpath"] else state_dict["last_model_path"]
        super().load_state_dict({**state_dict, "dirpath": self.dirpath, "last_model_path": last})
        self._rewards = state_dict.get("rewards", {})


def _reward(trainer: Trainer) -> float:
    """`val/reward` of the last validation; the lowest value if there is none."""
    value = float(trainer.callback_metrics.get(REWARD, -math.inf))
    return -math.inf if math.isnan(value) else value
