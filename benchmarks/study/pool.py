"""Makes runs concurrently, one thread each; runs that have a record are skipped."""

import argparse
import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path

import yaml

from benchmarks.commands import CORES, command
from benchmarks.study.methods import CORE, METHODS
from benchmarks.study.policies import FOLDER
from benchmarks.study.records import TUNING_SEEDS, Job
from benchmarks.study.store import Store, add_options

HERE = Path(os.path.relpath(Path(__file__).parent))  # relative, since it is written into the records


def options(name: str, doc: str | None, tasks: Sequence[str] = (), methods: Sequence[str] = CORE) -> argparse.ArgumentParser:
    """A parser with the options of every stage that makes runs."""
    parser = command(f"study.{name}", doc)
    tasks = tasks or [path.stem for path in sorted((HERE / "tasks").glob("*.yaml"))]
    parser.add_argument("--task", nargs="+", default=tasks, help=f"configs, or names in tasks/; default: {' '.join(tasks)}")
    told = f"of {', '.join(METHODS)}, or all; default: {' '.join(methods)}"
    parser.add_argument("--method", nargs="+", default=list(methods), metavar="NAME", help=told)
    parser.add_argument("--workers", type=int, default=CORES, help="runs at a time; default: the cores")
    return add_options(parser)


def fresh_seeds(given: Sequence[int]) -> Sequence[int]:
    """Seeds of a comparison, different from the seeds for tuning rates."""
    if set(given) & set(TUNING_SEEDS):
        raise SystemExit(f"error: --seeds has one of {TUNING_SEEDS}, by which learning rates are tuned; give others")
    return given


def tasks_of(arguments: argparse.Namespace) -> list[str]:
    """Paths of the configs, which must exist, and so must their start policies."""
    paths = [name if name.endswith(".yaml") else str(HERE / "tasks" / f"{name}.yaml") for name in arguments.task]
    for path in paths:
        if not Path(path).exists():
            raise SystemExit(f"error: no task {path}; give the path of a config, or a name in {HERE / 'tasks'}")
        model = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["model"]
        policy = Path(str(model.get("init_args", model).get("model")))
        if policy.parent == FOLDER and not policy.exists():
            raise SystemExit(f"error: {path} starts from {policy}, which is missing: run python -m benchmarks.study.pretrain")
    return paths


def methods_of(arguments: argparse.Namespace) -> list[str]:
    """Names of methods, in the order in which they are made."""
    names = list(METHODS) if "all" in arguments.method else arguments.method
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise SystemExit(f"error: unknown method {unknown[0]}; choose among {', '.join(METHODS)}")
    return names


def make_runs(jobs: Sequence[Job], store: Store, workers: int) -> None:
    """Make the runs that have no record. A failed run does not stop the others, and is an error at the end."""
    to_make = [job for job in jobs if job.file not in store]
    print(f"{len(jobs)} wanted, {len(jobs) - len(to_make)} of them made already", flush=True)
    failures, start = 0, time.perf_counter()
    # New processes, since torch does not survive a fork; each makes many runs, since starting takes as long as a short one.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_prepare) as pool:
        futures = [pool.submit(_make, job, store.folder) for job in to_make]
        for number, future in enumerate(as_completed(futures), 1):
            error = future.exception()
            failures += error is not None
            outcome = future.result() if error is None else f"FAILED: {error}"
            print(f"[{number}/{len(to_make)}, {time.perf_counter() - start:.0f} s] {outcome}", flush=True)
    if failures:
        raise SystemExit(f"error: {failures} runs failed; see the lines above")


def _prepare() -> None:
    threading.Thread(target=_end_with_starter, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    from hybrid_lightning.process import prepare_process

    prepare_process()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _end_with_starter() -> None:
    """End a worker whose starter was killed; without this it would continue."""
    starter = parent_process()
    assert starter is not None
    wait([starter.sentinel])
    os._exit(1)


def _make(job: Job, folder: Path) -> str:
    from benchmarks.study.runner import make_run  # which imports what _prepare has to come before

    return make_run(job, folder)
