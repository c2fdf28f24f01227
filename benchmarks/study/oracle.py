"""Trains each module fully in turn, LoRA on all others, to see which is worth it: `python -m benchmarks.study.oracle`.

What a scorer has to foretell. The runs are those of the method `only:MODULE`, at the learning rate of the hybrid.
"""

import argparse
import os
import sys
from pathlib import Path

from benchmarks.study.methods import METHODS
from benchmarks.study.pool import make_runs, tasks_of
from benchmarks.study.records import Job, of_method
from benchmarks.study.store import Store, add_options, store_of
from benchmarks.study.tuning import best_rate


def module_names(store: Store, task: str) -> list[str]:
    """All candidate modules, as full fine-tuning trained them.

    Raises:
        SystemExit: If it has not been tuned yet, whose runs name them.
    """
    runs = of_method(store, "sweep", task, "fft")
    if not runs:
        raise SystemExit(f"error: the oracle needs the names of the modules: sweep fft on {task} first")
    return runs[0].full_modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--task", nargs="+", default=["facts"], help="as of the other stages; default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(4)), help="default: 0 to 3")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    add_options(parser)
    arguments = parser.parse_args()
    store = store_of(arguments)
    jobs = [
        Job(task, f"only:{module}", best_rate(store, task, METHODS["hybrid"]), seed, "run")
        for seed in arguments.seeds
        for task in tasks_of(arguments)
        for module in module_names(store, Path(task).stem)
    ]
    if make_runs(jobs, store, arguments.workers):
        sys.exit("error: some runs failed; see the lines above")


if __name__ == "__main__":
    main()
