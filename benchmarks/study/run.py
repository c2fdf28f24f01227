"""Compares the methods on fresh seeds, at their tuned learning rates: `python -m benchmarks.study.run`."""

from pathlib import Path

from benchmarks.study.methods import METHODS
from benchmarks.study.pool import fresh_seeds, make_runs, methods_of, options, tasks_of
from benchmarks.study.records import Job
from benchmarks.study.store import store_of
from benchmarks.study.tuning import best_rate, rank_of


def main() -> None:
    parser = options("run", __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)), help="default: 0 to 7")
    given = parser.parse_args()
    methods, store = [METHODS[name] for name in methods_of(given)], store_of(given)
    # Seed by seed, so that whatever has been made when it is stopped can be compared.
    jobs = [
        Job(task, method.name, best_rate(store, task, method), seed, "run", rank_of(method, store, Path(task).stem))
        for seed in fresh_seeds(given.seeds)
        for task in tasks_of(given)
        for method in methods
    ]
    make_runs(jobs, store, given.workers)


if __name__ == "__main__":
    main()
