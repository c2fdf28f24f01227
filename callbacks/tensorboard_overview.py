"""`TensorBoardOverview`: what matters, on TensorBoard's first page."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hybrid_lightning.callbacks.display import tensorboard_writers

# TensorBoard orders groups by name, and digits come first.
GROUP = "0_overview"
_TRAINING = (
    "reward",
    "completions/mean_length",
    "completions/clipped_ratio",
    "solve_rate/mixed",
    "entropy",
    "kl",
    "clip_ratio/region_mean",
)


class TensorBoardOverview(Callback):
    """Repeats the metrics that tell whether a run goes well in one group, the first one of the page.

    All metrics also stand in groups under their own names, which are those that users of TRL know.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Repeat the training metrics after each optimizer step."""
        if not trainer.fit_loop._should_accumulate() and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._write(trainer, {name: trainer.callback_metrics[name] for name in _TRAINING if name in trainer.callback_metrics})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Repeat the accuracies of validations during `fit`, the one before training included."""
        if trainer.state.fn == "fit":
            metrics = trainer.callback_metrics
            names = [name for name in metrics if name == "val/greedy_accuracy" or name.startswith("val/avg@")]
            self._write(trainer, {name: metrics[name] for name in names})

    def _write(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            for writer in tensorboard_writers(trainer):
                for name, value in metrics.items():
                    writer.add_scalar(f"{GROUP}/{name.replace('/', ' ')}", float(value), trainer.global_step)
