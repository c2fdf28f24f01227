"""Accuracy against trained parameters and memory, from rank 1 to full fine-tuning: `python -m benchmarks.study.frontier`.

Each seed of a small task has a start policy of its own, which all methods share, so that intervals hold for other policies too;
policies that take long to make are shared by several seeds, and SmolLM2 is one. Rates are those of `benchmarks.study.sweep`; a
control that exchanges what a method chose has that method's. What scores nothing trains for `SCORING_STEPS` more steps, the time
that scoring by updates takes. Needs the start policies of the seeds:

    python -m benchmarks.study.pretrain --policy wide deep products tracker sorter --seeds 0 1 2 3
"""

import argparse
import os
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from benchmarks.study.frontier_report import points_of, report, same_policy
from benchmarks.study.methods import METHODS, Method
from benchmarks.study.policies import POLICY_OF, folder_of
from benchmarks.study.pool import make_runs, tasks_of, work_side_by_side
from benchmarks.study.records import TUNING_SEEDS, Job
from benchmarks.study.runner import measure_memory
from benchmarks.study.store import Store, add_options, store_of
from benchmarks.study.tuning import best_rate
from hybrid_lightning.adapters.plan import model_digest

SCORING_STEPS = 8
FRONTIER = (
    *("lora_r1", "lora", "lora_r4", "lora_r8", "lora_r16", "fft"),
    *("mlp_r4", "mlp_r8", "mlp_r16", "mlp_only_r4", "mlp_only_r8"),
    *("own_r2", "own_r4", "own_r8", "own_r16", "own_mlp_r4", "own_mlp_r8", "shuffled_r4", "shuffled_r8"),
    *("budget_2", "budget_5", "hybrid", "budget_20", "budget_40", "hybrid_one_rate", "hybrid_by_width"),
    *(
        "hybrid_10_r1",
        "hybrid_10_r4",
        "hybrid_10_r8",
        "hybrid_20_r8",
        "hybrid_40_r8",
        "hybrid_10_r8_one_rate",
        "hybrid_10_r8_by_width",
    ),
    *("update_tail_10_r2", "update_tail_10_r8", "random_mlp", "random_mlp_10_r8"),
)
TASKS = (
    *("facts", "facts_deep", "products_direct"),
    *("fresh/new_automaton", "fresh/new_order", "fresh/new_order_wide", "fresh/smollm2_codes"),
)


def tuned_as(name: str) -> str:
    """The method whose rate a method takes: its own, or that of what it is a control of."""
    return name.replace("shuffled", "own")


def extra_steps(method: Method) -> int:
    """Steps that make up for not scoring."""
    scores = ("hybrid", "budget", "update_tail", "spread")
    return 0 if method.spread in ("own", "own_mlp", "shuffled") or method.name.startswith(scores) else SCORING_STEPS


def jobs_of(store: Store, task: str, names: list[str], seeds: list[int]) -> list[Job]:
    """The runs of a task, seed by seed, so that whatever has been made when it is stopped can be compared.

    Raises:
        SystemExit: If a start policy is not there, or is another than that of runs of its seed, or a rate is not tuned.
    """
    jobs = []
    started = {
        record.seed: record.model_digest for point in points_of(store, Path(task).stem).values() for record in point.records
    }
    for seed in seeds:
        recipe = POLICY_OF.get(Path(task).stem)  # without one all seeds start from the task's model
        policy = None if recipe is None else folder_of(recipe, seed)
        if policy is not None and not (policy / "config.json").exists():
            raise SystemExit(
                f"error: {policy} is not there: run python -m benchmarks.study.pretrain --policy {recipe} --seeds {seed}"
            )
        if policy is not None and seed in started:
            same_policy(Path(task).stem, seed, started[seed], model_digest(AutoModelForCausalLM.from_pretrained(policy))[:16])
        for name in names:
            method = METHODS[name]
            rate = best_rate(store, task, METHODS[tuned_as(name)])
            jobs.append(Job(task, name, rate, seed, "frontier", method.rank, policy and str(policy), extra_steps(method)))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--task", nargs="+", default=list(TASKS), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(4)), help="default: 0 to 3; none: only the report")
    parser.add_argument("--method", nargs="+", default=list(FRONTIER), choices=METHODS, metavar="NAME", help="default: all of it")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time; default: the cores")
    add_options(parser)
    given = parser.parse_args()
    if set(given.seeds) & set(TUNING_SEEDS):
        sys.exit(f"error: --seeds has one of {TUNING_SEEDS}, by which learning rates are tuned; give others")
    failures = _make(given) if given.seeds else 0  # the report alone needs no start policies
    report(store_of(given), [Path(task).stem for task in given.task], given.results)
    if failures:
        sys.exit("error: some runs failed; see the lines above")


def _make(given: argparse.Namespace) -> int:
    """Make the runs and measure the memory of each method; returns the number of failures."""
    store = store_of(given)
    jobs = [job for task in tasks_of(given) for job in jobs_of(store, task, given.method, given.seeds)]
    jobs.sort(key=lambda job: job.seed)
    failures = make_runs(jobs, store, given.workers)
    first = [job.memory for job in jobs if job.seed == jobs[0].seed]
    return failures + work_side_by_side(measure_memory, first, store, given.workers)


if __name__ == "__main__":
    main()
