"""Makes one run of the study in this process, with the project's command line."""

import contextlib
import hashlib
import json
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.commands import versions
from benchmarks.live_tensors import LiveTensors
from benchmarks.study.methods import METHODS
from benchmarks.study.records import Job, Record
from benchmarks.study.store import write
from hybrid_lightning.cli.main import HybridLightningCLI
from hybrid_lightning.errors import TrainingError

# Nothing of a run is kept but its record and its log.
QUIET = {
    "trainer.logger": False,
    "trainer.default_root_dir": "runs/study/last",  # plan and config of each run, in a version_N of its own
    "trainer.enable_progress_bar": False,
    "checkpoint.monitor": None,
    "checkpoint.save_top_k": 0,
    "checkpoint.save_last": False,
}
LOGS = Path("runs/study/logs")


class Curve(Callback):
    """Records the validations of a run."""

    trainer: Trainer
    module: Any

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.trainer, self.module = trainer, pl_module

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn in ("fit", "validate"):
            self.points.append({"step": trainer.global_step, **accuracies(trainer, "val")})


def accuracies(trainer: Trainer, stage: str) -> dict[str, float]:
    """avg@k and greedy accuracy of the last evaluation."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    sampled = [value for name, value in metrics.items() if name.removeprefix(f"{stage}/avg@").isdigit()]
    return {"avg": round(sampled[0], 5), "greedy": round(metrics[f"{stage}/greedy_accuracy"], 5)}


def make_run(job: Job, folder: Path) -> str:
    """Train and test, or measure the memory, and write the record; returns the result in one line, or raises RuntimeError."""
    log = (LOGS / job.file).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            return (_measure_memory if job.purpose == "memory" else _run)(job, folder / job.file)
        except (Exception, SystemExit) as error:  # the other runs continue, whatever the error
            traceback.print_exc()
            cause = error.__cause__ or error  # below jsonargparse's account of the whole config
            raise RuntimeError(f"{job.task_name}, {job.method}: {type(cause).__name__}: {cause}; see {log}") from None


def _measure_memory(job: Job, path: Path) -> str:
    """Train for two steps, and record the largest sum of live tensors.

    It does not include scratch memory within operators, or other memory of the process.
    """
    peak = Peak()
    torch.set_num_threads(1)
    _, command = _command_line(job)
    short = {"trainer.max_steps": 2, "trainer.val_check_interval": 2, "trainer.limit_val_batches": 0}
    with peak.live:
        HybridLightningCLI(args=[*command, *arguments(short)], trainer_defaults={"callbacks": [peak]})
    write({"job": vars(job), "commit": versions()["commit"], "bytes": peak.live.peak}, path)
    return f"{job.task_name} {job.method}: {peak.live.peak / 2**20:.2f} MiB"


class Peak(Callback):
    """Counts the tensors of training, sampling included."""

    def __init__(self) -> None:
        self.live = LiveTensors()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.live.count([*pl_module.parameters(), *pl_module.buffers()])
        self.live.restart_peak()


def _command_line(job: Job) -> tuple[dict[str, Any], list[str]]:
    """A run's changes to its task, and its command line."""
    method, task = METHODS[job.method], read_task(job.task)
    options = {
        **method.options(task, job.rank, job.learning_rate, job.seed),
        "seed_everything": job.seed,
        "model.seed": job.seed,  # of prompts and sampling; the problems do not change
    }
    if job.policy is not None:
        options["model.model"] = job.policy
    if job.purpose == "frontier":  # only its end is of interest
        options["trainer.max_steps"] = options["trainer.val_check_interval"] = task["trainer"]["max_steps"] + job.extra_steps
    given = {**options, **QUIET}
    if method.module is not None:
        supervised = task["model"].get("class_path", "").endswith("SupervisedModule")
        given["model"] = method.supervised_module if supervised else method.module
    command = "validate" if method.group == "start" else "fit"
    return options, [command, "--config", job.task, *arguments(given)]


def _run(job: Job, path: Path) -> str:
    torch.set_num_threads(1)
    start, processor = time.perf_counter(), time.process_time()
    options, command = _command_line(job)
    curve, diverged = Curve(), False
    try:
        HybridLightningCLI(args=command, trainer_defaults={"callbacks": [curve]})
    except TrainingError:  # of too large a learning rate: that is a result
        diverged = True
        curve.points.append({"step": curve.trainer.max_steps, "avg": 0.0, "greedy": 0.0})
    trained = time.perf_counter() - start
    trainer, module = curve.trainer, curve.module
    plan = module.plan  # none where nothing is trained
    scoring = next(c.totals()["scoring"] for c in trainer.callbacks if hasattr(c, "totals"))  # type: ignore[attr-defined]
    if not diverged:
        trainer.test(module, datamodule=trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
    installed = versions()
    record = Record(
        job=vars(job),
        options=options,
        config_digest=hashlib.sha256(Path(job.task).read_bytes()).hexdigest()[:16],
        model_digest=module.policy.base_digest[:16],
        commit=installed.pop("commit"),
        versions=installed,
        curve=curve.points,
        test={"avg": 0.0, "greedy": 0.0} if diverged else accuracies(trainer, "test"),
        trainable_parameters=sum(p.numel() for p in module.parameters() if p.requires_grad) if plan else 0,
        diverged=diverged,
        full_modules=list(plan.full_modules) if plan else [],
        seconds={"run": round(trained, 2), "scoring": round(scoring, 3)},
        processor_seconds=round(time.process_time() - processor, 2),
    )
    write(asdict(record), path)
    settings = f"lr={record.learning_rate:g} seed={record.seed}"
    return f"{job.task_name} {job.method} {settings}: validation {record.validation:.3f}, test {record.accuracy:.3f}"


def read_task(path: str) -> dict[str, Any]:
    """The config of a task."""
    content: dict[str, Any] = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return content


def arguments(options: dict[str, Any]) -> list[str]:
    """Options in command-line form; classes come before their own options."""
    ordered = sorted(options.items(), key=lambda option: option[0].count("."))
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in ordered]
