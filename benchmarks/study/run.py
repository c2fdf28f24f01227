"""Compares the methods on fresh seeds, at their tuned learning rates: `python -m benchmarks.study.run`."""

import argparse
import sys
from pathlib import Path

from benchmarks.study.methods import METHODS
from benchmarks.study.pool import add_options, make_runs, methods_of, tasks_of
from benchmarks.study.ranks import rank_of
from benchmarks.study.records import TUNING_SEEDS, Job
from benchmarks.study.store import Store, store_of
from benchmarks.study.tuning import best_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)), help="default: 0 to 7")
    arguments = parser.parse_args()
    if set(arguments.seeds) & set(TUNING_SEEDS):
        sys.exit(f"error: --seeds has one of {TUNING_SEEDS}, by which learning rates are tuned; give others")
    names, store = methods_of(arguments), store_of(arguments)
    # Seed by seed, so that whatever has been made when it is stopped can be compared.
    jobs = [
        Job(task, name, rate, seed, "run", rank)
        for seed in arguments.seeds
        for task in tasks_of(arguments)
        for name, rate, rank in _settings(names, store, task)
    ]
    if make_runs(jobs, store, arguments.workers):
        sys.exit("error: some runs failed; see the lines above")


def _settings(names: list[str], store: Store, task: str) -> list[tuple[str, float, int | None]]:
    methods = [METHODS[name] for name in names]
    return [(method.name, best_rate(store, task, method), rank_of(method, store, Path(task).stem)) for method in methods]


if __name__ == "__main__":
    main()
