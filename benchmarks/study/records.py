"""The record of each run: a small JSON file, named after the run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.study.store import Store, malformed

Purpose = Literal["sweep", "run", "trial", "frontier", "memory"]  # the last measures a run's first steps
TUNING_SEEDS = (1000, 1001)  # never used in the comparison


@dataclass(frozen=True)
class Job:
    """One run to make."""

    task: str  # path of its config
    method: str
    learning_rate: float
    seed: int
    purpose: Purpose
    rank: int | None = None  # of LoRA, where the method leaves it open
    policy: str | None = None  # folder of the start policy; None: the task's
    extra_steps: int = 0  # in addition to the task's

    @property
    def task_name(self) -> str:
        return Path(self.task).stem

    @property
    def file(self) -> str:
        """Name of the run's record."""
        if self.purpose == "memory":
            return f"memory/{self.task_name}/{self.method}.json"
        return f"{self.purpose}/{self.task_name}/{self.method}/lr={self.learning_rate:g}-seed={self.seed}.json"


@dataclass(frozen=True)
class Record:
    """The result of a run."""

    job: dict[str, Any]
    options: dict[str, Any]  # beside the task's config
    config_digest: str  # of the task's file
    model_digest: str  # of the start policy
    commit: str  # with a + if the working tree had other changes
    versions: dict[str, str]
    curve: list[dict[str, float]]  # of the validation problems: step, avg@k, greedy
    test: dict[str, float]  # avg@k and greedy on the test problems, at the end
    trainable_parameters: int
    diverged: bool = False  # a gradient was not finite: the run ended there, and its answers count as wrong
    full_modules: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # on the clock, other work beside it
    processor_seconds: float = 0.0

    @property
    def seed(self) -> int:
        return int(self.job["seed"])

    @property
    def learning_rate(self) -> float:
        return float(self.job["learning_rate"])

    @property
    def validation(self) -> float:
        """avg@k on the validation problems at the end, for tuning learning rates."""
        return self.curve[-1]["avg"]

    @property
    def accuracy(self) -> float:
        """avg@k on the test problems at the end, for comparing methods."""
        return self.test["avg"]


def of_method(store: Store, purpose: Purpose, task: str, method: str) -> list[Record]:
    """All records of a method, by learning rate and seed."""
    folder = f"{purpose}/{task}/{method}"
    records = []
    for name, content in store.within(folder).items():
        try:
            records.append(Record(**content))
        except TypeError as error:
            raise SystemExit(f"error: {malformed(store.folder / folder / name, str(error))}") from None
    return sorted(records, key=lambda r: (r.learning_rate, r.seed))
