"""One training job of several processes: start it, kill one of its ranks, wait until all its processes have ended."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.commands import ROOT, environment
from benchmarks.processes import Family

STEPS = 16
SIZES = ["--trainer.accelerator=cpu", f"--trainer.max_steps={STEPS}", "--trainer.limit_val_batches=0"]
SIZES += ["--trainer.num_sanity_val_steps=0", "--trainer.enable_progress_bar=false", "--model.prompts_per_rollout=8"]
SIZES += ["--model.samples_per_prompt=4", "--adapter.calibration_prompts=16"]
SIZES += ["--checkpoint.monitor=step", "--checkpoint.save_top_k=2", "--checkpoint.every_n_train_steps=1"]
# torchrun watches its processes; where the command starts them itself, Lightning does.
LAUNCHERS = {
    "the command": [sys.executable, "-m"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"],
}
CASES = {  # how checkpoints are written: overlay of configs/strategy, options
    "DDP, file": ("ddp", ()),
    "FSDP2, file": ("fsdp", ()),
    "FSDP2, folder": ("fsdp", ("--trainer.strategy.save_distributed_checkpoint=true",)),
    "DDP, file, silent": ("ddp", ('--trainer.strategy={"class_path": "benchmarks.faults.silent.SilentDDP"}',)),
}


def command(case: str, launcher: str, *more: str) -> list[str]:
    """The job's command; it runs in its own folder."""
    overlay, options = CASES[case]
    configs = [f"--config={ROOT / 'configs' / name}" for name in ("gspo.yaml", f"strategy/{overlay}.yaml")]
    return [*LAUNCHERS[launcher], "hybrid_lightning", "fit", *configs, "--trainer.devices=2", *SIZES, *options, *more]


@dataclass
class Job:
    """A job that runs in its folder, with its output in `log`."""

    command: list[str]
    folder: Path
    log: Path
    family: Family = field(default_factory=Family)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        variables = {**environment(1), **self.family.environment}
        self.begin = time.monotonic()
        with self.log.open("w") as log:
            streams: Any = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            self.main = subprocess.Popen(self.command, cwd=self.folder, env=variables, **streams)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.begin

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the first run in the job's folder."""
        return self.folder / "runs" / "gspo" / "version_0" / "checkpoints"

    def rank(self, number: int) -> int | None:
        """The id of a rank's process, once it exists."""
        for process, (command, variables) in self.family.members().items():
            trains = "fit" in command and "torch.distributed.run" not in command  # and is neither torchrun nor a worker
            if trains and int(variables.get("LOCAL_RANK", 0)) == number:
                return process
        return None

    def writes(self) -> bool:
        """Whether a checkpoint is being written or removed at this moment."""
        try:
            return any(name.endswith(".part") for name in os.listdir(self.checkpoints))
        except FileNotFoundError:
            return False

    def wait(self, condition: Callable[[], bool], limit_s: float, every_s: float = 0.05) -> bool:
        """Wait until a condition holds; False if the job ends first, or if it takes too long."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if self.main.poll() is not None or time.monotonic() > deadline:
                return condition()
            time.sleep(every_s)
        return True

    def end(self, limit_s: float) -> float | None:
        """Wait until all processes of the job have ended; returns the seconds, or None if some had to be killed.

        Time in which the whole machine, or all processes of the job, are stopped does not count.
        """
        waited = 0.0
        while waited < limit_s:
            before = time.monotonic()
            if self.main.poll() is not None and not self.family.members():
                return waited
            time.sleep(0.05)
            waited += min(1.0, time.monotonic() - before)
        while self.main.poll() is None or self.family.members():
            self.main.kill()
            self.family.kill()
            time.sleep(0.05)
        return None


@dataclass(frozen=True)
class Moment:
    """The moment when a rank is killed."""

    phase: str  # start, training or write
    seconds: float  # since the start of the job; in a write, since that write has begun
    write: int = 0  # which one

    @classmethod
    def draw(cls, generator: random.Random, first_write_s: float, end_s: float) -> "Moment":
        """Draw a moment: one in five before the first checkpoint, two in training after it, two in the middle of a write."""
        phase = generator.choice(["start", "training", "training", "write", "write"])
        if phase == "write":
            return cls(phase, generator.uniform(0, 0.03), generator.randrange(1, 25))
        return cls(phase, generator.uniform(*((0.0, first_write_s) if phase == "start" else (first_write_s, end_s))))

    def wait(self, job: Job, limit_s: float) -> bool:
        """Wait for the moment; False if the job ends before it."""
        if self.phase != "write":
            return job.wait(lambda: job.seconds >= self.seconds, limit_s)
        for _ in range(self.write):
            if not (job.wait(lambda: not job.writes(), limit_s, 0.0005) and job.wait(job.writes, limit_s, 0.0005)):
                return False
        time.sleep(self.seconds)
        return job.main.poll() is None

    def __str__(self) -> str:
        in_write = f"write {self.write} + {1000 * self.seconds:.0f} ms"
        return in_write if self.phase == "write" else f"{self.phase}: {self.seconds:.1f} s"
