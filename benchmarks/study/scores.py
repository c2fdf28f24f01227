"""Scores the modules of a task again and again, without training: `python -m benchmarks.study.scores`.

By every scorer and on several calibration draws; by the default scorer also with fewer and more calibration prompts, for other
ranks, from sketches instead of exact gradients, and from the gradient of supervised examples instead of RL's.
"""

import argparse
import contextlib
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.study.methods import METHODS, SEVERAL_LOSSES
from benchmarks.study.pool import tasks_of, work_side_by_side
from benchmarks.study.runner import QUIET, arguments, commit, read_task
from benchmarks.study.store import add_options, store_of, write

SCORERS = (
    "PreconditionedTail",
    "TailEnergy",
    "TailFraction",
    "GradientNorm",
    "WeightGradient",
    "SpectrumSNR",
    "Probe",
    *(METHODS[name].changes["adapter.scorer"] for name in ("early_outputs", "early", "late", "largest")),
)
SUPERVISED = {
    "model": "SupervisedModule",
    "model.loss": "SupervisedLoss",
    "model.examples_per_step": 256,
    "data.format": "DemonstrationFormat",
    "data.format.prompt": "PlainFormat",
    "data.format.completion": "{answer}",
}


@dataclass(frozen=True)
class Scoring:
    """One scoring that is to be made."""

    task: str  # path of its config
    name: str  # of the variant
    seed: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """Name of its record."""
        return f"scores/{Path(self.task).stem}/{self.name}/seed={self.seed}.json"


def variants(task: str) -> dict[str, dict[str, Any]]:
    """Options of every variant, by name."""
    prompts = read_task(task)["adapter"]["calibration_prompts"]
    by_scorer: dict[str, dict[str, Any]] = {scorer.rpartition(".")[2]: {"adapter.scorer": scorer} for scorer in SCORERS}
    by_scorer["SpectrumSNR"] |= SEVERAL_LOSSES
    sizes = {f"prompts={n}": {"adapter.calibration_prompts": n} for n in (prompts // 4, prompts // 2, 2 * prompts, 4 * prompts)}
    ranks = {f"rank={r}": {"adapter.rank": r} for r in (1, 4, 8, 16)}
    return {**by_scorer, **sizes, **ranks, "sketched": {"adapter.gradients": "SketchedGradients"}, "supervised": SUPERVISED}


def score(scoring: Scoring, folder: Path) -> str:
    """Score once and write the record."""
    from hybrid_lightning.cli import HybridLightningCLI

    options = {"seed_everything": scoring.seed, "model.seed": scoring.seed, **scoring.options}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cli = HybridLightningCLI(args=["score", "--config", scoring.task, *arguments({**options, **QUIET})])
    plan = cli.model.plan
    content = {
        "task": scoring.task,
        "options": options,
        "commit": commit(),
        "model_digest": plan.model_digest[:16],
        "calibration": plan.calibration,
        "scores": {module.name: module.score for module in plan.candidates},
    }
    write(content, folder / scoring.file)
    return f"{Path(scoring.task).stem} {scoring.name} seed={scoring.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--task", nargs="+", default=["facts", "facts_deep"], help="as of the other stages; default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="calibration draws; default: 0 to 4")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    add_options(parser)
    given = parser.parse_args()
    scorings = [
        Scoring(task, name, seed, options)
        for task in tasks_of(given)
        for seed in given.seeds
        for name, options in variants(task).items()
    ]
    raise SystemExit(work_side_by_side(score, scorings, store_of(given), given.workers))


if __name__ == "__main__":
    main()
