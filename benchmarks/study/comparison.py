"""The numbers of one task, from its records: what each method reached, and what the project set out to reach."""

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
    """The group of a method, or of that whose ratio of rates is tuned; those that were given up are controls."""
    name = RATIO_TUNED.get(method, (method,))[0]
    return METHODS[name].group if name in METHODS else "control"


@dataclass(frozen=True)
class Row:
    """One method on one task."""

    method: str
    records: list[Record]
    accuracy: Estimate
    over_lora: Estimate | None  # paired by seed; None of LoRA itself
    over_random: Estimate | None  # likewise
    gap: Estimate | None  # share of the gap between LoRA and FFT

    @property
    def group(self) -> str:
        return group_of(self.method)

    @property
    def learning_rate(self) -> float:
        return self.records[0].learning_rate

    @property
    def trainable(self) -> float:
        return fmean(record.trainable_parameters for record in self.records)


@dataclass(frozen=True)
class Comparison:
    """All methods on one task."""

    task: str
    rows: dict[str, Row]

    @property
    def gap(self) -> Estimate | None:
        """FFT less LoRA."""
        fft, lora = self.rows.get("fft"), self.rows.get("lora")
        return difference(_by_seed(fft.records), _by_seed(lora.records)) if fft and lora else None

    @property
    def has_gap(self) -> bool:
        """Whether LoRA falls short of FFT, beyond chance."""
        return self.gap is not None and self.gap.low > 0

    @property
    def best_baseline(self) -> Row | None:
        """The best of the methods that only adapt; of the task's rank, as the hybrid is."""
        there = [self.rows[name] for name in BASELINES if name in self.rows]
        return max(there, key=lambda row: row.accuracy.value) if len(there) == len(BASELINES) else None

    def relative_gain(self, method: str = "hybrid") -> float | None:
        """Of a hybrid over the best baseline, on the seeds that both have."""
        best, ours = self.best_baseline, self.rows.get(method)
        if best is None or ours is None:
            return None
        accuracies, others = _by_seed(ours.records), _by_seed(best.records)
        common = accuracies.keys() & others.keys()
        return fmean(accuracies[s] for s in common) / fmean(others[s] for s in common) - 1 if common else None


def compare(store: Store, task: str, first_seed: int = 0) -> Comparison:
    """Read the runs of a task with this seed or a higher one; methods without any are left out."""
    names = dict.fromkeys((*METHODS, *store.folders(f"run/{task}")))
    records = {name: [record for record in runs_at_best_rate(store, task, name) if record.seed >= first_seed] for name in names}
    for name, variants in RATIO_TUNED.items():
        tuned = {variant: values for variant in variants if (values := means(of_method(store, "sweep", task, variant)).values())}
        if len(tuned) > 1:
            records[name] = records[max(tuned, key=lambda variant: max(tuned[variant]))]
    seeds = {name: _by_seed(found) for name, found in records.items() if found}
    nothing: dict[int, float] = {}
    chance = "random" if "random" in seeds else "random_own_ratio"  # where the hybrids have the ratio of the task
    lora, random, fft = (seeds.get(name, nothing) for name in ("lora", chance, "fft"))
    rows = {
        name: Row(
            name,
            records[name],
            mean(list(accuracies.values())),
            difference(accuracies, lora) if name != "lora" else None,
            difference(accuracies, random) if name != chance else None,
            gap_closed(accuracies, lora, fft),
        )
        for name, accuracies in seeds.items()
    }
    return Comparison(task, rows)


def over_tasks(comparisons: Sequence[Comparison], method: str, other: str) -> Estimate | None:
    """Mean over tasks of the difference of two methods, with the interval over seeds; None where a task lacks one of them."""
    if not comparisons or any(name not in comparison.rows for comparison in comparisons for name in (method, other)):
        return None
    ours, theirs = (_mean_by_seed([comparison.rows[name].records for comparison in comparisons]) for name in (method, other))
    return difference(ours, theirs)


def _mean_by_seed(tasks: Sequence[list[Record]]) -> dict[int, float]:
    accuracies = [_by_seed(records) for records in tasks]
    common = set.intersection(*(set(by_seed) for by_seed in accuracies))
    return {seed: fmean(by_seed[seed] for by_seed in accuracies) for seed in common}


def _by_seed(records: list[Record]) -> dict[int, float]:
    return {record.seed: record.accuracy for record in records}
