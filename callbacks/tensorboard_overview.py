"""`TensorBoardOverview`: puts the most important metrics on TensorBoard's first page."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

# TensorBoard sorts groups and cards by name, and digits come first.
GROUP = "0_overview"
_VALIDATION = ("val/avg@", "val/greedy_accuracy")  # avg@ stands for any number of samples
_EXAMPLES = ("val/loss", "val/rewards/accuracies")  # metrics of training on given completions
_TRAINING = (
    "reward",
    "completions/mean_length",
    "completions/clipped_ratio",
    "solve_rate/mixed",
    "entropy",
    "kl",
    "clip_ratio/region_mean",
    "time/step_s",
    "throughput/tokens_per_second",
)


class TensorBoardOverview(Callback):
    """Repeats the metrics that show whether a run goes well in one group, the first on the page.

    All metrics are also there under their own names, which are those that users of TRL know.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Repeat the training metrics after each optimizer step."""
        if not trainer.fit_loop._should_accumulate() and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._write(trainer, _TRAINING, first=len(_VALIDATION) + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Repeat the accuracies of validations during `fit`, the one before training included."""
        if trainer.state.fn == "fit":
            self._write(trainer, _VALIDATION, first=1)
            self._write(trainer, _EXAMPLES, first=len(_VALIDATION) + len(_TRAINING) + 1)

    def _write(self, trainer: Trainer, wanted: tuple[str, ...], first: int) -> None:
        if not trainer.is_global_zero:
            return
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        for number, name_or_stem in enumerate(wanted, start=first):
            for name, value in trainer.callback_metrics.items():
                stem = name.rstrip("0123456789") if name_or_stem.endswith("@") else name
                if stem == name_or_stem:
                    for writer in writers:
                        writer.add_scalar(f"{GROUP}/{number} {name.replace('/', ' ')}", float(value), trainer.global_step)
