"""`EvaluationReport`: scores of the policy on each set of problems, as a table and as JSON."""

import json
import re
import time
from collections.abc import Collection, Mapping

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from hybrid_lightning.callbacks.display import say, show_table
from hybrid_lightning.callbacks.rollouts import say_completions
from hybrid_lightning.callbacks.run_folder import run_folder
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.metrics import LOWER, OVERALL, UPPER
from hybrid_lightning.training.module import LanguageModule

Scores = Mapping[str, Mapping[str, float]]  # set -> metric -> value
OF_VALIDATION = re.compile(r"(?:val(?:id(?:ation)?)?|eval|test)(?![a-z])")
_NOT_SHOWN = (f"/{LOWER}", f"/{UPPER}", "/problems")
_OVERALL_TITLE = "mean of sets"


class EvaluationReport(Callback):
    """Prints a table after `validate` and `test`, and in `fit` if sets have names; writes `evaluation.json` to the run folder.

    The numbers and names are the same as in TensorBoard, without `val/` or `test/`. `overall` is the mean over named sets, each
    with the same weight, or the only set if no set has a name. Shares have 95% confidence intervals over problems (see
    `hybrid_lightning.metrics.problem_means`). The file holds the last evaluation of the run.

    The module has the numbers as `evaluation.last`: set -> metric -> value, with "" for all sets together.

    Raises:
        ConfigError: If a checkpoint or another callback monitors a metric that the validation before training does not measure.
            Lightning reports that only at the first checkpoint, which may be hours later. (`Trainer.check` reports it even before
            that validation, if only this project's code and Lightning's code can log metrics.)
    """

    def __init__(self) -> None:
        self._start = 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    on_test_start = on_validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the scores, and before training check the monitored metrics."""
        self._report(trainer, pl_module, "validation")
        if trainer.sanity_checking:
            check_monitors(trainer, trainer.callback_metrics)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the scores."""
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        scores = pl_module.evaluation.last if isinstance(pl_module, LanguageModule) else {}
        folder = run_folder(trainer)
        if not scores or not trainer.is_global_zero:
            return
        fitting, by = trainer.state.fn == "fit", measured_by(trainer, pl_module)
        if not fitting or len(scores) > 1:
            step = f" (step {trainer.global_step})" if fitting else ""
            show_table(score_table(scores, f"{split.capitalize()}{step}"))
            say("Shares in percent, with 95% confidence intervals over problems")
        if not fitting:
            if split == "validation":
                say_completions(pl_module)
            shown = ", ".join(f"{name} {value}" for name, value in by.items())
            say(f"Measured by {shown}: compare only with results measured the same way")
        if folder is None or trainer.sanity_checking:
            return
        report = {
            "split": split,
            "model": str(pl_module.hparams.get("model", "")),
            "checkpoint": None if fitting or not trainer.ckpt_path else str(trainer.ckpt_path),
            "step": trainer.global_step if fitting else None,
            "seconds": round(time.perf_counter() - self._start, 2),
            "measured_by": by,
            "overall": scores[OVERALL],
            "sets": {name: values for name, values in scores.items() if name != OVERALL},
        }
        path = folder / "evaluation.json"
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if not fitting:
            say(f"Written to {path} in {report['seconds']:.1f} s of evaluation")


def measured_by(trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
    """What determines the scores besides the policy: the reward, the format of the problems, the dtypes of the passes."""
    reward = pl_module.task.reward if isinstance(pl_module, LanguageModule) else None
    parts = {"reward": reward, "format": getattr(trainer.datamodule, "format", None)}  # type: ignore[attr-defined]
    names = {name: type(part).__name__ for name, part in parts.items() if part is not None}
    dtype = pl_module.hparams.get("dtype")
    return {**names, **({"dtype": str(dtype)} if dtype else {}), "precision": str(trainer.precision)}


def check_monitors(trainer: Trainer, measured: Collection[str], trained: Collection[str] | None = None) -> None:
    """Refuse callbacks that monitor a metric which neither validation nor training logs.

    `measured` holds names that validation logs; there may be others. `trained` holds the first parts of the names that training
    logs. If these are not known, only names that sound like validation results are refused.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or monitor in measured:
            continue
        if OF_VALIDATION.match(monitor) or (trained is not None and monitor.partition("/")[0] not in trained):
            names = [name for name in measured if name.startswith("val/") and not name.endswith(_NOT_SHOWN)] or ["null"]
            raise ConfigError(
                f"{type(callback).__name__} has monitor={monitor}, which validation does not measure; "
                f"give it (as in --checkpoint.monitor={names[0]}) one of {', '.join(names)}, or null"
            )


def score_table(scores: Scores, title: str) -> Table:
    """A table of metrics (problems, accuracy and reward first) by sets; shares are in percent, with their intervals."""
    names = [name for name in scores if name != OVERALL]
    columns = {name: scores[name] for name in names} | {_OVERALL_TITLE if names else "": scores[OVERALL]}
    table = Table(title=title, title_justify="left", show_header=bool(names))
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for metric in sorted(scores[OVERALL], key=lambda name: (name != "problems", not name.startswith("avg@"), name != "reward")):
        if not metric.endswith((f"/{LOWER}", f"/{UPPER}")):
            table.add_row(metric, *(_cell(values, metric) for values in columns.values()))
    return table


def _cell(values: Mapping[str, float], metric: str) -> str:
    if metric not in values:  # the loss on given completions is known only for all sets together
        return "-"
    value = values[metric]
    if metric == "problems":
        return f"{value:.0f}"
    if f"{metric}/{LOWER}" not in values:
        return f"{value:.3f}"
    return f"{100 * value:.1f} [{100 * values[f'{metric}/{LOWER}']:.1f}, {100 * values[f'{metric}/{UPPER}']:.1f}]"
