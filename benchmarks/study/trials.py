"""First trials on the old tasks, by which formulas are chosen: `python -m benchmarks.study.trials`.

Which 10% of the modules: chosen by the tails of updates, which are found in several ways, beside the default and random MLPs. How
to spend the parameters of LoRA of one rank: evenly, on MLPs, or by the spectra of updates. The updates are those of two other
seeds (`python -m benchmarks.study.updates`). No rate is tuned: hybrids have that of the default, LoRA has that of uniform LoRA of
the same rank, so that these are trials and no comparison.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from benchmarks.study.estimates import difference, mean, rank_correlation
from benchmarks.study.methods import METHODS, Method
from benchmarks.study.pool import make_runs, tasks_of
from benchmarks.study.records import Job, Record, of_method
from benchmarks.study.spread import OWN_SPREADS, SPREADS, mean_tails
from benchmarks.study.store import Store, add_options, store_of
from benchmarks.study.tuning import best_rate
from benchmarks.study.updates import STEPS, WAYS
from hybrid_lightning.adapters.rank_pattern import module_group

CHOICES = ("random_mlp", "hybrid", "tail_fft_32", "tail_adam_32", "tail_moments_8", "tail_moments_rank1_8")
TAIL = 8  # rank beyond which tails are compared
REPORT = "trials.md"


def uniform(rank: int) -> str:
    """Name of the method that is LoRA of this rank on all modules; of the task's rank it is `lora`."""
    return "lora" if rank == 2 else f"lora_r{rank}"


def spent(rank: int) -> list[str]:
    """Names of the methods that spend the parameters of LoRA of this rank."""
    return [uniform(rank), *(f"{spread}_r{rank}" for spread in SPREADS if spread not in OWN_SPREADS)]


def rate_of(store: Store, task: str, method: Method) -> float:
    """The tuned rate of the method that a method is compared with."""
    rival = "hybrid" if method.name in CHOICES else uniform(method.rank or 2)
    return best_rate(store, task, METHODS[rival])


def accuracies(store: Store, task: str, method: str) -> dict[int, float]:
    """Test accuracy by seed."""
    return {record.seed: record.accuracy for record in _records(store, task, method)}


def _records(store: Store, task: str, method: str) -> list[Record]:
    return of_method(store, "trial", task, method)


def report(store: Store, tasks: list[str], ranks: list[int]) -> str:
    """All trials as Markdown: mean accuracy, and differences paired by seed."""
    lines = ["# Trials on the old tasks", "", *(__doc__ or "").splitlines()[2:], "", "## Whether cheaper ways keep the order", ""]
    lines += [
        f"Rank correlation with the tails beyond rank {TAIL} of {STEPS[-1]} steps of full fine-tuning, by optimizer steps: all"
    ]
    lines += ["modules, and those of MLPs alone. Means over the seeds of `updates.py`, which describes the ways.", ""]
    lines += _orders(store, tasks)
    lines += ["", "## Which 10% of the modules", "", "Percent right on test problems, with 95% intervals.", ""]
    lines += _table(store, tasks, CHOICES, ("random_mlp", "hybrid"))
    for rank in ranks:
        lines += ["", f"## The parameters of LoRA of rank {rank}", ""]
        lines += _table(store, tasks, spent(rank), (uniform(rank), f"mlp_r{rank}"))
    return "\n".join(lines) + "\n"


def _orders(store: Store, tasks: list[str]) -> list[str]:
    lines = [f"| task | way | {' | '.join(map(str, STEPS))} |", f"|---|---|{'---:|' * len(STEPS)}"]
    for task in tasks:
        known = [way for way in WAYS if store.within(f"updates/{task}/{way}")]
        if "fft" not in known:
            continue
        wanted = mean_tails(store, task, "fft", STEPS[-1], TAIL)
        for way in known:
            cells = []
            for steps in STEPS:
                found = mean_tails(store, task, way, steps, TAIL)
                cells.append(" / ".join(f"{_agreement(found, wanted, names):.2f}" for names in (list(wanted), _mlps(wanted))))
            lines.append(f"| {task} | `{way}` | {' | '.join(cells)} |")
    return lines


def _mlps(names: Iterable[str]) -> list[str]:
    return [name for name in names if module_group(name) == "mlp"]


def _agreement(first: dict[str, float], second: dict[str, float], names: list[str]) -> float:
    return rank_correlation([first[name] for name in names], [second[name] for name in names])


def _table(store: Store, tasks: list[str], methods: list[str] | tuple[str, ...], rivals: tuple[str, str]) -> list[str]:
    lines = [
        f"| task | method | seeds | trained | accuracy | less {rivals[0]} | less {rivals[1]} |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for task in tasks:
        found = {method: accuracies(store, task, method) for method in methods}
        for method, values in found.items():
            if not values:
                continue
            trained = fmean(record.trainable_parameters for record in _records(store, task, method))
            gains = [difference(values, found[rival]) if method != rival and found[rival] else None for rival in rivals]
            cells = [task, method, len(values), f"{trained:,.0f}", mean(list(values.values())).text()]
            lines.append(f"| {' | '.join(map(str, [*cells, *('-' if gain is None else gain.text() for gain in gains)]))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--task", nargs="+", default=["facts", "facts_deep", "products_direct"], help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(16, 24)), help="default: 16 to 23")
    parser.add_argument("--ranks", type=int, nargs="*", default=[4], help="whose parameters are spent (default: %(default)s)")
    parser.add_argument("--method", nargs="*", default=list(CHOICES), choices=CHOICES, help="choices of modules (default: all)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    add_options(parser)
    given = parser.parse_args()
    store, tasks = store_of(given), tasks_of(given)
    methods = [METHODS[name] for name in (*given.method, *(name for rank in given.ranks for name in spent(rank)))]
    jobs = [
        Job(task, method.name, rate_of(store, task, method), seed, "trial", method.rank)
        for seed in given.seeds
        for task in tasks
        for method in methods
    ]
    failures = make_runs(jobs, store, given.workers)
    (given.results / REPORT).write_text(
        report(store_of(given), [Path(task).stem for task in tasks], given.ranks), encoding="utf-8"
    )
    if failures:
        sys.exit("error: some runs failed; see the lines above")


if __name__ == "__main__":
    main()
