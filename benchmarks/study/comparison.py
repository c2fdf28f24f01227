"""The numbers of one task, from its records: the result of each method, and the project's goals."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.study.estimates import Estimate, difference, gap_closed, mean
from benchmarks.study.methods import METHODS
from benchmarks.study.records import Record, of_method
from benchmarks.study.store import Store
from benchmarks.study.tuning import means, runs_at_best_rate

BASELINES = ("lora", "dora", "rslora", "adalora")  # the four that only adapt
# Each has variants that differ in the ratio of the two rates, all tuned; the tuning seeds say which one a task takes.
RATIO_TUNED = {f"{name}_tuned_ratio": (name, f"{name}_one_rate", f"{name}_own_ratio") for name in ("hybrid", "random")}
UNSEEN = 8  # seeds from this one on were run after the default score had been chosen, by runs with lower ones
WANTED_GAP = 0.9  # of the gap between LoRA and full fine-tuning, closed by the hybrid
WANTED_GAIN = 0.0436  # over the best baseline, relative: what the paper reports on average


def group_of(method: str) -> str:
    """The group of a method, or of the hybrid with a tuned ratio of rates; abandoned methods are controls."""
    name = RATIO_TUNED.get(method, (method,))[0]
    return METHODS[name].group if name in METHODS else "control"


@dataclass(frozen=True)
class Point:
    """The result of one method on one task."""

    method: str
    records: list[Record]
    memory: int | None = None  # bytes of tensors at the peak of training, where it was measured

    @property
    def by_seed(self) -> dict[int, float]:
        return {record.seed: record.accuracy for record in self.records}

    @property
    def accuracy(self) -> Estimate:
        return mean(list(self.by_seed.values()))

    @property
    def trained(self) -> float:
        return fmean(record.trainable_parameters for record in self.records)

    @property
    def rate(self) -> float:
        return self.records[0].learning_rate


Points = dict[str, Point]


@dataclass(frozen=True)
class Comparison:
    """All methods on one task."""

    task: str
    rows: Points

    def by_seed(self, method: str) -> dict[int, float]:
        """Accuracies of a method; empty if it was not run."""
        return self.rows[method].by_seed if method in self.rows else {}

    def over(self, method: str, other: str) -> Estimate | None:
        """Difference of two methods, paired by seed; None for a method and itself, or if one was not run."""
        return None if method == other else difference(self.by_seed(method), self.by_seed(other))

    def over_random(self, method: str) -> Estimate | None:
        """Difference to a random choice; hybrids with the task's ratio of rates have their own random choice."""
        return self.over(method, "random" if "random" in self.rows else "random_own_ratio")

    def gap_closed(self, method: str) -> Estimate | None:
        """Share of the gap between LoRA and FFT."""
        return gap_closed(self.by_seed(method), self.by_seed("lora"), self.by_seed("fft"))

    @property
    def has_gap(self) -> bool:
        """Whether LoRA falls short of FFT, beyond chance."""
        gap = self.over("fft", "lora")
        return gap is not None and gap.low > 0

    @property
    def best_baseline(self) -> Point | None:
        """The best adapter method with the task's rank, which the hybrid also has."""
        there = [self.rows[name] for name in BASELINES if name in self.rows]
        return max(there, key=lambda row: row.accuracy.value) if len(there) == len(BASELINES) else None

    def relative_gain(self) -> float | None:
        """Relative gain of the hybrid over the best baseline, on the seeds that both have."""
        ours, others = self.by_seed("hybrid"), self.best_baseline.by_seed if self.best_baseline else {}
        common = ours.keys() & others.keys()
        return fmean(ours[s] for s in common) / fmean(others[s] for s in common) - 1 if common else None


def compare(store: Store, task: str, first_seed: int = 0) -> Comparison:
    """Read the runs of a task with this seed or a higher one; methods without any are left out."""
    names = dict.fromkeys((*METHODS, *store.folders(f"run/{task}")))
    records = {name: [record for record in runs_at_best_rate(store, task, name) if record.seed >= first_seed] for name in names}
    for name, variants in RATIO_TUNED.items():
        tuned = {variant: values for variant in variants if (values := means(of_method(store, "sweep", task, variant)).values())}
        if len(tuned) > 1:
            records[name] = records[max(tuned, key=lambda variant: max(tuned[variant]))]
    return Comparison(task, {name: Point(name, found) for name, found in records.items() if found})


def over_tasks(comparisons: Sequence[Comparison], method: str, other: str) -> Estimate | None:
    """Mean over tasks of the difference of two methods, with the interval over seeds; None if a task has only one of them."""
    return difference(*(_mean_by_seed(comparisons, name) for name in (method, other))) if comparisons else None


def _mean_by_seed(comparisons: Sequence[Comparison], method: str) -> dict[int, float]:
    accuracies = [comparison.by_seed(method) for comparison in comparisons]
    common = set.intersection(*map(set, accuracies))
    return {seed: fmean(by_seed[seed] for by_seed in accuracies) for seed in common}
