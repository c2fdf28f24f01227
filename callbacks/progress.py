"""How a run shows its progress: `RolloutProgress` on a terminal, `StepLines` in a file, a pipe or a notebook."""

import logging
import sys
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import RunningStage

from hybrid_lightning.callbacks.display import console, minute_lines, say
from hybrid_lightning.training.lightning_internals import ends_step
from hybrid_lightning.training.module import LanguageModule

NORMS = ("grad_norm/full", "grad_norm/lora")
_LOGS = ("lightning.pytorch", "lightning.fabric")
_SHORT = {"completions/mean_length": "tokens"}  # metric -> its name beside the bar
_STAGES = {
    RunningStage.SANITY_CHECKING: "Validation before training",
    RunningStage.VALIDATING: "Validation",
    RunningStage.TESTING: "Test",
    RunningStage.PREDICTING: "Predictions",
}


class RolloutProgress(RichProgressBar):
    """Lightning's progress bar with reward and completion length, and a second bar with the tokens of a rollout in progress."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10)
        self._generation_task: Any = None

    @property
    def total_train_batches(self) -> int | float:
        """Number of micro-batches in this epoch, limited by `max_steps`."""
        of_epoch = self.trainer.num_training_batches
        if self.trainer.max_steps < 0:
            return of_epoch
        done = (self.trainer.fit_loop.batch_idx + 1) % of_epoch  # at the start of an epoch Lightning still has the last batch_idx
        left = (self.trainer.max_steps - self.trainer.global_step) * self.trainer.accumulate_grad_batches
        return min(of_epoch, done + left)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start listening to the generation of rollouts, and let Lightning's log lines appear above the bar."""
        super().setup(trainer, pl_module, stage)
        for log in map(logging.getLogger, _LOGS):
            for handler in [*log.handlers]:
                if type(handler) is logging.StreamHandler and handler.stream is sys.stderr:
                    log.removeHandler(handler)
                    # Follows `sys.stderr`, which a progress bar replaces by a stream that prints above the bar.
                    log.addHandler(logging._StderrHandler())  # type: ignore[attr-defined]
        if isinstance(pl_module, LanguageModule) and self._show_generation not in pl_module.run.listeners:
            pl_module.run.listeners.append(self._show_generation)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Metrics to show, by names that fit beside a bar, and without the version number of the run folder."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)  # type: ignore[assignment]
        metrics.pop("v_num", None)
        return {_SHORT.get(name, name): value for name, value in metrics.items()}

    @property
    def sanity_check_description(self) -> str:
        """Text before the bar of the validation before training."""
        return "Validation before training"

    def _get_train_description(self, current_epoch: int) -> str:
        """Text before the training bar. Lightning's text would be "Epoch 0/-2" if `max_steps` ends the run."""
        return f"Epoch {current_epoch}"

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening to the generation."""
        super().teardown(trainer, pl_module, stage)
        if isinstance(pl_module, LanguageModule) and self._show_generation in pl_module.run.listeners:
            pl_module.run.listeners.remove(self._show_generation)

    def _stop_progress(self) -> None:
        """Remove the bar, so that the run's last messages are at the end of the screen."""
        if self.progress is not None:
            self.progress.live.transient = True
        super()._stop_progress()

    def _show_generation(self, running: int, decoded: int, total: int) -> None:
        if self.progress is None or self._progress_stopped or self.is_disabled:
            return
        if self._generation_task not in self.progress.task_ids:
            self._generation_task = self._add_task(total, "Generating")
        done = running == 0 or decoded == total
        self.progress.update(self._generation_task, completed=decoded, total=total, visible=not done)


class StepLines(Callback):
    """Prints a line for each optimizer step where the screen is a file without a progress bar; in a notebook, one changing line.

    Before the steps it prints what begins: a validation or the first step. During generation it prints one line a minute.
    """

    def __init__(self) -> None:
        self._shown: Any = None  # display handle of the line in a notebook
        self._advance = minute_lines("Generated tokens")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start listening to the generation of completions."""
        if isinstance(pl_module, LanguageModule) and trainer.is_global_zero and self._listen not in pl_module.run.listeners:
            pl_module.run.listeners.append(self._listen)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        if isinstance(pl_module, LanguageModule) and self._listen in pl_module.run.listeners:
            pl_module.run.listeners.remove(self._listen)

    def _listen(self, running: int, decoded: int, total: int) -> None:
        self._advance(decoded, total)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print that a validation, a test or predictions begin."""
        _begin(trainer, _STAGES[trainer.state.stage])  # type: ignore[index]

    on_test_start = on_predict_start = on_validation_start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print that the first step begins."""
        self._shown = None
        _begin(trainer, f"Step {trainer.global_step + 1}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Print the step, after `StepTimer` has measured it."""
        if not ends_step(trainer) or not trainer.is_global_zero:
            return
        steps = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        of_task = pl_module.task.shown_metrics if isinstance(pl_module, LanguageModule) else ()
        names = dict.fromkeys(("reward", "accuracy", "loss", *of_task, "entropy", *NORMS, "time/step_s"))
        shown = (f"{name} {value:.4g}" for name, value in logged_values(trainer, names).items())
        text = f"Step {trainer.global_step}{steps}: {'  '.join(shown)}"
        if console().is_jupyter:
            from IPython.display import display

            self._shown = self._shown or display(display_id=True)  # type: ignore[no-untyped-call]
            self._shown.update({"text/plain": text}, raw=True)
        else:
            say(text)


def _begin(trainer: Trainer, phase: str) -> None:
    if trainer.is_global_zero and not console().is_jupyter:
        say(f"{phase} ...")


def logged_values(trainer: Trainer, names: Iterable[str]) -> dict[str, float]:
    """Values that the last optimizer step logged under these names."""
    values = trainer.callback_metrics
    return {name: float(values[name]) for name in names if name in values}
