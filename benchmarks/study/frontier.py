"""Accuracy against trained parameters and memory, from rank 1 to full fine-tuning: `python -m benchmarks.study.frontier`.

Each seed of a small task has its own start policy, which all methods share, so intervals also hold for other policies. Several
seeds share policies that take long to make, such as SmolLM2. Rates come from `benchmarks.study.sweep`. Methods without scoring
train for `SCORING_STEPS` more steps, the time that scoring by `UpdateTail` took (in commit 7fce0125). `benchmarks.study.analyse`
makes tables and figures. Needs the start policies of the seeds:

    python -m benchmarks.study.pretrain --policy wide deep products tracker sorter --seeds 0 1 2 3
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import AutoModelForCausalLM

from benchmarks.study.claims import points_of, same_policy
from benchmarks.study.methods import METHODS, Method
from benchmarks.study.policies import POLICY_OF, folder_of
from benchmarks.study.pool import fresh_seeds, make_runs, methods_of, options, tasks_of
from benchmarks.study.records import Job, Purpose
from benchmarks.study.store import Store, store_of
from benchmarks.study.tuning import best_rate
from hybrid_lightning.adapters.plan import model_digest

SCORING_STEPS = 8
FRONTIER = (
    *("lora_r1", "lora", "lora_r4", "lora_r8", "lora_r16", "fft"),
    *("mlp_r4", "mlp_r8", "mlp_r16", "mlp_only_r8"),
    *("budget_2", "budget_5", "hybrid", "budget_20", "budget_40", "hybrid_one_rate"),
    *("hybrid_10_r4", "hybrid_10_r8", "hybrid_20_r8", "hybrid_40_r8", "hybrid_10_r8_one_rate"),
    *("random_mlp_one_rate", "random_mlp_10_r8_one_rate"),
)
TASKS = (
    *("facts", "facts_deep", "products_direct"),
    *("fresh/new_automaton", "fresh/new_order", "fresh/new_order_wide", "fresh/smollm2_codes"),
)


def extra_steps(method: Method) -> int:
    """Steps that make up for not scoring."""
    return 0 if method.group in ("hybrid", "budget") else SCORING_STEPS


def jobs_of(store: Store, task: str, names: list[str], seeds: Sequence[int], given_rate: float | None = None) -> list[Job]:
    """The runs of a task, seed by seed, so that the finished runs can be compared if the command is stopped.

    With a given rate, runs are trials.
    """
    jobs, points = [], points_of(store, Path(task).stem).values()
    started = {record.seed: record.model_digest for point in points for record in point.records}
    for seed in seeds:
        recipe = POLICY_OF.get(Path(task).stem)  # without a recipe all seeds start from the task's model
        policy = None if recipe is None else folder_of(recipe, seed)
        if policy is not None and not (policy / "config.json").exists():
            make = f"python -m benchmarks.study.pretrain --policy {recipe} --seeds {seed}"
            raise SystemExit(f"error: {policy} is not there: run {make}")
        if policy is not None and seed in started:
            same_policy(Path(task).stem, seed, started[seed], model_digest(AutoModelForCausalLM.from_pretrained(policy))[:16])
        for name in names:
            method = METHODS[name]
            rate = best_rate(store, task, method) if given_rate is None else given_rate
            purpose: Purpose = "frontier" if given_rate is None else "trial"
            jobs.append(Job(task, name, rate, seed, purpose, method.rank, policy and str(policy), extra_steps(method)))
    return jobs


def main() -> None:
    parser = options("frontier", __doc__, TASKS, FRONTIER)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(4)), help="default: 0 to 3")
    parser.add_argument("--rate", type=float, help="of LoRA in all of them, instead of the tuned one: a trial")
    given = parser.parse_args()
    store, names, seeds = store_of(given), methods_of(given), fresh_seeds(given.seeds)
    jobs = [job for task in tasks_of(given) for job in jobs_of(store, task, names, seeds, given.rate)]
    jobs.sort(key=lambda job: job.seed)
    memory = [replace(job, purpose="memory") for job in jobs if job.seed == jobs[0].seed and job.purpose == "frontier"]
    make_runs([*jobs, *memory], store, given.workers)


if __name__ == "__main__":
    main()
