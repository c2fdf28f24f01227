"""Makes runs side by side, one thread each; what has a record already is left alone."""

import argparse
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Protocol, TypeVar

import yaml

from benchmarks.study.methods import CORE, METHODS
from benchmarks.study.policies import FOLDER
from benchmarks.study.records import Job
from benchmarks.study.store import Store
from benchmarks.study.store import add_options as add_store_options

HERE = Path(os.path.relpath(Path(__file__).parent))  # relative, since it is written into the records


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every stage that makes runs."""
    parser.add_argument(
        "--task",
        nargs="+",
        default=[str(path) for path in sorted((HERE / "tasks").glob("*.yaml"))],
        help="configs of tasks, or names of those in tasks/; default: all of these",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        default=list(CORE),
        metavar="NAME",
        help=f"of {', '.join(METHODS)}, or all; default: {' '.join(CORE)}",
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time; default: the cores")
    add_store_options(parser)


def tasks_of(arguments: argparse.Namespace) -> list[str]:
    """Paths of the configs.

    Raises:
        SystemExit: If one is missing, or its start policy.
    """
    paths = [name if name.endswith(".yaml") else str(HERE / "tasks" / f"{name}.yaml") for name in arguments.task]
    for path in paths:
        if not Path(path).exists():
            raise SystemExit(
                f"error: there is no task {path}; give the path of a config, or one of the names in {HERE / 'tasks'}"
            )
        model = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["model"]
        policy = Path(str(model.get("init_args", model).get("model")))
        if policy.parent == FOLDER and not policy.exists():
            raise SystemExit(
                f"error: {path} starts from {policy}, which is not there yet: run python -m benchmarks.study.pretrain"
            )
    return paths


def methods_of(arguments: argparse.Namespace) -> list[str]:
    """Names of methods, in the order in which they are made.

    Raises:
        SystemExit: If one is unknown.
    """
    names = list(METHODS) if "all" in arguments.method else arguments.method
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise SystemExit(f"error: there is no method {unknown[0]}; there are {', '.join(METHODS)}")
    return names


class Work(Protocol):
    """What has a record when it is done."""

    @property
    def file(self) -> str: ...


W = TypeVar("W", bound=Work)


def work_side_by_side(make: Callable[[W, Path], str], works: Sequence[W], store: Store, workers: int) -> int:
    """Make what has no record; one that fails does not stop the others.

    Args:
        make: Makes one and writes its record into a folder; returns what is shown of it.
        works: All that are wanted.
        store: The records that there are; its folder gets the new ones.
        workers: How many at a time.

    Returns:
        The number of failures.
    """
    to_make = [work for work in works if work.file not in store]
    print(f"{len(works)} wanted, {len(works) - len(to_make)} of them made already", flush=True)
    failures, start = 0, time.perf_counter()
    # New processes, since torch does not survive a fork; each makes many runs, since starting takes as long as a short one.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_prepare) as pool:
        futures = [pool.submit(make, work, store.folder) for work in to_make]
        for number, future in enumerate(as_completed(futures), 1):
            error = future.exception()
            failures += error is not None
            outcome = future.result() if error is None else f"FAILED: {error}"
            print(f"[{number}/{len(to_make)}, {time.perf_counter() - start:.0f} s] {outcome}", flush=True)
    return failures


def make_runs(jobs: Sequence[Job], store: Store, workers: int) -> int:
    """Make the runs that have no record.

    Returns:
        The number of failures.
    """
    return work_side_by_side(_make, jobs, store, workers)


def _prepare() -> None:
    threading.Thread(target=_end_with_starter, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    from hybrid_lightning.process import prepare_process

    prepare_process()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _end_with_starter() -> None:
    """A worker whose starter was killed would go on with what it has been given."""
    starter = parent_process()
    assert starter is not None
    wait([starter.sentinel])
    os._exit(1)


def _make(job: Job, folder: Path) -> str:
    from benchmarks.study.records import load
    from benchmarks.study.runner import make_run

    record = load(make_run(job, folder))
    settings = f"lr={record.learning_rate:g} seed={record.seed}"
    return f"{job.task_name} {job.method} {settings}: validation {record.validation:.3f}, test {record.accuracy:.3f}"
