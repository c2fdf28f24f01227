"""The learning rate of a method: the best one on the validation problems, with seeds that are used for nothing else."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.study.methods import Method, own_rate
from benchmarks.study.records import Record, of_method
from benchmarks.study.store import Store

STEP = 2.0  # between neighbours on a grid
FIRST = 3  # rates that tuning starts with
EXTENSIONS = 4  # at most so many rates beyond the first ones


def means(records: Sequence[Record], seeds: Iterable[int] | None = None) -> dict[float, float]:
    """Mean validation accuracy by learning rate, for the rates that all these seeds have; None for all existing seeds."""
    wanted = {record.seed for record in records} if seeds is None else set(seeds)
    by_rate: dict[float, dict[int, float]] = defaultdict(dict)
    for record in records:
        by_rate[record.learning_rate][record.seed] = record.validation
    complete = {rate: by_seed for rate, by_seed in sorted(by_rate.items()) if wanted <= by_seed.keys()}
    return {rate: fmean(by_seed[seed] for seed in wanted) for rate, by_seed in complete.items()}


def first_rates(method: Method, task: dict[str, Any]) -> list[float]:
    """The first rates of tuning: the task's rate, for full fine-tuning or for LoRA, and its neighbours."""
    own = own_rate(task, "lr_full" if method.group == "full" else "lr_lora")
    return [rounded(own / STEP), rounded(own), rounded(own * STEP)]


def next_rates(first: Sequence[float], tuned: dict[float, float]) -> list[float]:
    """The next rates to try: the first ones, then the rate beyond an edge that is the best so far."""
    if len(tuned) < FIRST:
        return [rate for rate in first if rate not in tuned]
    if len(tuned) >= FIRST + EXTENSIONS:
        return []
    lowest, highest, best = min(tuned), max(tuned), max(tuned.values())
    if tuned[lowest] == best:
        return [rounded(lowest / STEP)]
    if tuned[highest] == best:
        return [rounded(highest * STEP)]
    return []


def outcome(tuned: dict[float, float]) -> str:
    """The best rate in words, and whether a better one may lie beyond those tried."""
    best = _best(tuned)
    edge = f", at the edge of the {len(tuned)} tried" if best in (min(tuned), max(tuned)) else ""
    return f"best learning rate {best:g}, validation {tuned[best]:.3f}{edge}"


def rounded(rate: float) -> float:
    """Round to three digits, so that the rate in a file's name is exact."""
    return float(f"{rate:.3g}")


def best_rate(store: Store, task: str, method: Method) -> float:
    """The tuned learning rate of a method on a task (a name or a config's path); 0 for the start policy."""
    if method.group == "start":
        return 0.0
    tuned = means(of_method(store, "sweep", Path(task).stem, method.name))
    if len(tuned) < FIRST or next_rates((), tuned):
        raise SystemExit(
            f"error: {method.name} has no tuned learning rate for {task} yet: run python -m benchmarks.study.sweep --task {task} "
            f"--method {method.name} first"
        )
    return _best(tuned)


def rank_of(method: Method, store: Store, task: str) -> int | None:
    """The rank at which plain LoRA trains the same number of parameters as the hybrid, for methods that need it; else None."""
    if not method.match_state:
        return None
    hybrid, lora = (of_method(store, "sweep", task, name) for name in ("hybrid", "lora"))
    if not hybrid or not lora:
        raise SystemExit(f"error: {method.name} needs the parameters of hybrid and lora; sweep these two on {task} first")
    of_one = lora[0].trainable_parameters / lora[0].options["adapter.rank"]
    return math.ceil(fmean(record.trainable_parameters for record in hybrid) / of_one)


def runs_at_best_rate(store: Store, task: str, method: str) -> list[Record]:
    """The runs on fresh seeds that count for a method: the runs at its tuned learning rate, or all runs if there is no sweep."""
    runs, tuned = of_method(store, "run", task, method), means(of_method(store, "sweep", task, method))
    return [run for run in runs if run.learning_rate == _best(tuned)] if tuned else runs


def _best(tuned: dict[float, float]) -> float:
    """The best rate; the lowest of equal ones."""
    return max(tuned, key=lambda rate: (tuned[rate], -rate))
