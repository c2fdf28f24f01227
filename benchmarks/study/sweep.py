"""Tunes the learning rate of each method on each task: `python -m benchmarks.study.sweep`.

Every method gets the same two seeds (or one for long runs: `--seeds 1000`) and three rates: the task's rate and its neighbours, a
factor of 2 apart. While the best rate is at the edge of the tried rates, the next rate beyond it is tried as well.
"""

from pathlib import Path

from benchmarks.study.methods import METHODS
from benchmarks.study.pool import make_runs, methods_of, options, tasks_of
from benchmarks.study.records import TUNING_SEEDS, Job, of_method
from benchmarks.study.runner import read_task
from benchmarks.study.store import Store, store_of
from benchmarks.study.tuning import first_rates, means, next_rates, outcome, rank_of


def open_jobs(task: str, names: list[str], seeds: list[int], store: Store) -> list[Job]:
    """Runs that the next round of tuning needs."""
    jobs = []
    for name in names:
        method = METHODS[name]
        if method.group == "start":
            continue
        tuned = means(of_method(store, "sweep", Path(task).stem, name), seeds)
        for rate in next_rates(first_rates(method, read_task(task)), tuned):
            rank = rank_of(method, store, Path(task).stem)
            jobs += [Job(task, name, rate, seed, "sweep", rank) for seed in seeds]
    return [job for job in jobs if job.file not in store]


def main() -> None:
    parser = options("sweep", __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(TUNING_SEEDS), choices=TUNING_SEEDS, help="default: both")
    arguments = parser.parse_args()
    tasks, names, store = tasks_of(arguments), methods_of(arguments), store_of(arguments)
    # Methods that give others their rank come first.
    for stage in ([n for n in names if not METHODS[n].match_state], [n for n in names if METHODS[n].match_state]):
        while jobs := [job for task in tasks for job in open_jobs(task, stage, arguments.seeds, store)]:
            make_runs(jobs, store, arguments.workers)
    for task in tasks:
        for method in (METHODS[name] for name in names if METHODS[name].group != "start"):
            tuned = means(of_method(store, "sweep", Path(task).stem, method.name))
            print(f"{Path(task).stem}, {method.name}: {outcome(tuned)}")


if __name__ == "__main__":
    main()
