"""`RunReport`: collects a run's results, and writes them as `report.html` and `report.json` into the run folder.

`reports/page.py` draws the page; `compare` reads `report.json` of several runs (`compare_runs.py`).
"""

import json
import math
import os
import platform
import re
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from hybrid_lightning.callbacks.display import resume_command, saved_config, say
from hybrid_lightning.callbacks.graceful_stop import last_checkpoint
from hybrid_lightning.callbacks.hybrid_adapter_setup import HybridAdapterSetup
from hybrid_lightning.callbacks.rollouts import shown_prompt, shown_text
from hybrid_lightning.callbacks.run_folder import find_callback, known_folder, run_folder
from hybrid_lightning.callbacks.run_settings import changed_settings, flatten_settings
from hybrid_lightning.callbacks.step_timer import StepTimer
from hybrid_lightning.metrics import Difference
from hybrid_lightning.reports.page import REPORT, ReportedRun, report_page
from hybrid_lightning.reports.verdict import compare_validations
from hybrid_lightning.sharding.atomic import unfinished_path
from hybrid_lightning.shared.stopping import RunStopped
from hybrid_lightning.training.lightning_internals import ends_step
from hybrid_lightning.training.module import LanguageModule

# The metrics with curves in the report, in page order.
CURVES = (
    r"val/(.+/)?reward",
    r"val/(.+/)?avg@\d+",
    r"val/(.+/)?greedy_accuracy",
    r"val/loss",
    r"val/rewards/accuracies",
    r"reward",
    r"rewards/.+/mean",
    r"completions/(mean_length|clipped_ratio)",
    r"solve_rate/mixed",
    r"loss",
    r"entropy",
    r"kl",
    r"clip_ratio/region_mean",
    r"grad_norm/(full|lora)",
    r"time/step_s",
)
_PART = re.compile("rewards/.+/mean")
_KEPT = re.compile(f"({'|'.join(CURVES)})(/ci_low|/ci_high)?")
_SAMPLES = 6  # problems with shown completions
_CHARACTERS = 4_000  # characters shown of a completion
_PACKAGES = ("hybrid-lightning", "torch", "lightning", "transformers", "peft", "vllm")


class RunReport(Callback):
    """Writes `report.html`, one file that needs no network, and its data as `report.json`, which `compare` reads.

    Both are written after each validation, when a run that has begun is stopped or fails, and by `RunSummary` at the end. They
    hold curves, the greedy completions of the same problems at the first and at the last validation, the plan, the options that
    differ from their defaults, the machine, the verdict and the next commands. A resumed run has the curves of both parts.

    The callback must come after `GracefulStop`: the report of a stopped run names its checkpoint.
    """

    def __init__(self) -> None:
        self._curves: dict[str, list[list[Any]]] = {}  # metric -> steps and values
        self._first: dict[str, Any] | None = None  # the first validation of all problems, and the last one
        self._last: dict[str, Any] | None = None
        self._peaks: dict[str, float] = {}
        self._about: dict[str, Any] | None = None  # settings and machine; they do not change

    def state_dict(self) -> dict[str, Any]:
        """The data collected so far, for a resumed run."""
        return {"curves": self._curves, "first": self._first, "last": self._last, "peaks": self._peaks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the resumed run's data."""
        self._curves, self._peaks = state_dict["curves"], state_dict["peaks"]
        self._first, self._last = state_dict["first"], state_dict["last"]

    def without_measurements(self, state: dict[str, Any]) -> dict[str, Any]:
        """See `Measuring`."""
        curves = {name: curve for name, curve in state["curves"].items() if not name.startswith("val/")}
        return {**state, "first": None, "last": None, "curves": curves}

    # ---- collecting

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the metrics of an optimizer step."""
        if ends_step(trainer):
            self._keep(trainer, validation=False)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the validation before training, if it covered all problems."""
        if trainer.num_sanity_val_batches == trainer.num_val_batches:
            self._validated(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep a validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated(trainer, pl_module)

    def _validated(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run_folder(trainer)
        if trainer.is_global_zero:
            self._keep(trainer, validation=True)
            self._last = {"step": trainer.global_step, **_evaluated(pl_module)}
            self._first = self._first or self._last
            self.write(trainer)

    def _keep(self, trainer: Trainer, validation: bool) -> None:
        """Keep the metrics of a validation or of a step; before training, skip metrics that compare with the start policy."""
        found = trainer.callback_metrics if trainer.is_global_zero else {}
        parts = {name for name in found if _PART.fullmatch(name)}
        without = shares_ahead(trainer.lightning_module) if trainer.global_step == 0 else set()
        without |= parts if len(parts) == 1 else set()  # a single part is the reward
        for name, value in found.items():
            if name.startswith("val/") == validation and _KEPT.fullmatch(name) and name not in without:
                steps, values = self._curves.setdefault(name, [[], []])
                steps.append(trainer.global_step)
                values.append(float(f"{float(value):.6g}"))

    def change(self, metric: str) -> Difference | None:
        """The change of a metric from the first to the last validation; None unless both validations have it by problem."""
        if self._first is None or self._last is None or self._first["step"] == self._last["step"]:
            return None
        return compare_validations(self._first, self._last, metric)

    # ---- writing

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write how far the run came, and how to resume it."""
        folder = known_folder(trainer)
        if trainer.state.fn != "fit" or folder is None:
            return
        stopped = folder / "checkpoints" / "stopped.ckpt"
        checkpoint = stopped if stopped.exists() else last_checkpoint(trainer)
        why = " ".join(str(exception).split()) or type(exception).__name__
        if isinstance(exception, RunStopped):
            why = signal.Signals(exception.number).name
        self.write(trainer, f"stopped: {why}", [resume_command(trainer, checkpoint)] if checkpoint else [])

    def write(self, trainer: Trainer, state: str = "not finished", commands: list[str] | None = None) -> Path | None:
        """Write the page, on the first process. This does not communicate with other ranks.

        `state` is "finished", "not finished", or "stopped: " and the reason; `commands` are the next commands to type. Returns
        None if the run has not begun, leaves no files, or the page cannot be written, which prints a warning.
        """
        folder = known_folder(trainer)
        if folder is None or not trainer.is_global_zero or not self._curves:
            return None
        try:
            return self._write(trainer, folder, state, commands or [])
        except Exception as error:  # any error: a run must not fail because of its report
            say(f"Warning: {folder / 'report.html'} could not be written: {type(error).__name__}: {error}")
            return None

    def _write(self, trainer: Trainer, folder: Path, state: str, commands: list[str]) -> Path:
        if self._about is None:
            self._about = {**_settings(trainer), "machine": machine(trainer)}
        timer = find_callback(trainer, StepTimer)
        self._peaks = {name: max(value, self._peaks.get(name, 0.0)) for name, value in _peaks(trainer).items()}
        report = {
            "state": state,
            "step": trainer.global_step,
            "max_steps": trainer.max_steps,
            "seconds": None if timer is None else round(sum(timer.totals().values()), 2),
            "peak_gib": self._peaks,
            "commands": commands,
            **self._about,
            "first": self._first,
            "last": self._last,
            "curves": {name: self._curves[name] for name in sorted(self._curves, key=_place)},
        }
        _replace(folder / REPORT, json.dumps(report, ensure_ascii=False) + "\n")
        return _replace(folder / "report.html", report_page(ReportedRun.read(folder)))


def shares_ahead(pl_module: LightningModule) -> set[str]:
    """Metrics that compare with the start policy, and are meaningless before training."""
    loss = pl_module.task.loss if isinstance(pl_module, LanguageModule) else None
    return {f"val/{name}" for name in getattr(loss, "shares_ahead", ())}


def _replace(path: Path, text: str) -> Path:
    """Write a file that is complete at every moment, for anyone who reads it in the meantime."""
    part = unfinished_path(path)
    part.write_text(text, encoding="utf-8")
    return part.replace(path)


def _place(name: str) -> int:
    return next(place for place, pattern in enumerate(CURVES) if re.match(f"({pattern})($|/ci_)", name))


def _evaluated(pl_module: LightningModule) -> dict[str, Any]:
    """Results of each problem of the last validation, and the greedy completions of some."""
    if not isinstance(pl_module, LanguageModule):
        return {"problems": [], "samples": []}
    evaluation, names = pl_module.evaluation, (f"avg@{pl_module.task.evaluation.samples}", "greedy_accuracy", "reward")
    rows = []
    for problem, values in evaluation.by_problem.items():
        measured = [values.get(name, math.nan) for name in names]
        rows.append([*problem, *(None if math.isnan(value) else round(value, 6) for value in measured)])
    samples: list[dict[str, Any]] = []
    if evaluation.greedy is None:
        return {"problems": rows, "samples": samples}
    greedy, rewards = evaluation.greedy, evaluation.greedy.scored
    for row in sorted({number * len(greedy.prompts) // _SAMPLES for number in range(_SAMPLES)}):
        sample = {
            "prompt": shown_prompt(greedy.prompts[row]),
            "answer": greedy.prompts[row].answer,
            "completion": shown_text(greedy.completions[row])[:_CHARACTERS],
            "finished": greedy.completions[row].finished,
            "correct": rewards.right(row, 0),
            "reward": round(float(rewards.total[row, 0]), 6) if rewards.counts(row, 0) else None,
        }
        samples.append(sample)
    return {"problems": rows, "samples": samples}


def _settings(trainer: Trainer) -> dict[str, Any]:
    """All options, and the ones that differ from their defaults: of the config, or for a run from Python as for its resume."""
    adapter = find_callback(trainer, HybridAdapterSetup)
    saved: dict[str, Any] = {} if adapter is None else adapter.resume.state()["settings"]
    found, defaults = {name: value for name, value in saved.items() if name in ("model", "data", "adapter")}, {}
    path, saver = saved_config(trainer), find_callback(trainer, SaveConfigCallback)
    if path is not None and saver is not None:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        defaults = yaml.safe_load(saver.parser.dump(saver.parser.get_defaults(), skip_none=False))
    settings = {**flatten_settings(found), "validation prompts": saved.get("validation prompts")}
    return {"settings": settings, "changed": changed_settings(found, defaults)}


def machine(trainer: Trainer) -> dict[str, str]:
    """The machine of this process, and the versions of the packages that compute."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        cpu = next(iter(re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())), cpu)
    found = {"devices": f"{trainer.world_size} x {name}", "CPU": f"{cpu}, {cores} cores, {torch.get_num_threads()} threads"}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    found |= {"system": platform.platform(), "Python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _peaks(trainer: Trainer) -> Mapping[str, float]:
    """Peak memory of the first process in GiB: on its device, and on the machine if the system reports it."""
    peaks, device = {}, trainer.strategy.root_device
    if device.type == "cuda":
        peaks["GPU"] = torch.cuda.max_memory_allocated(device) / 2**30
    with suppress(ImportError):  # absent on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 2**10
        peaks["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return {name: round(value, 3) for name, value in peaks.items()}
