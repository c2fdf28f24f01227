"""What the records of scoring and of the oracle say about each score."""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

from benchmarks.study.estimates import Estimate, correlation, mean
from benchmarks.study.records import of_method
from benchmarks.study.tables import markdown

DEFAULT = "PreconditionedTail"
Scores = Mapping[str, float]  # of each module


def read(results: Path, task: str) -> dict[str, list[Scores]]:
    """The scores of every variant, one entry for each calibration draw."""
    folders = sorted((results / "scores" / task).glob("*"))
    return {
        folder.name: [json.loads(path.read_text(encoding="utf-8"))["scores"] for path in sorted(folder.glob("*.json"))]
        for folder in folders
    }


def oracle(results: Path, task: str) -> dict[str, float]:
    """Mean validation accuracy with each module alone trained fully, over the seeds that all modules have.

    Not test accuracy, by which methods are compared: a score is chosen by this.
    """
    folders = sorted((results / "run" / task / "only").glob("*"))
    runs = {
        folder.name: {r.seed: r.validation for r in of_method(results, "run", task, f"only:{folder.name}")} for folder in folders
    }
    common = set.intersection(*(set(seeds) for seeds in runs.values())) if runs else set()
    return {module: fmean(seeds[s] for s in common) for module, seeds in runs.items()} if common else {}


def mean_scores(draws: Sequence[Scores]) -> dict[str, float]:
    return {module: fmean(draw[module] for draw in draws) for module in draws[0]}


def agreement(first: Scores, second: Scores) -> Estimate:
    """Rank correlation over modules."""
    modules = sorted(first)
    return correlation([first[m] for m in modules], [second[m] for m in modules])


def steadiness(draws: Sequence[Scores]) -> Estimate | None:
    """Rank correlation between two calibration draws, over all pairs of them; None for a single draw."""
    pairs = [agreement(first, second).value for first, second in combinations(draws, 2)]
    return mean(pairs) if pairs else None


def of_task(results: Path, task: str) -> str:
    """Each variant: how it agrees with the oracle, with the default score, and with itself on other draws; and its choice."""
    found, truth = read(results, task), oracle(results, task)
    default = mean_scores(found[DEFAULT]) if found.get(DEFAULT) else {}
    rows = []
    for name, draws in found.items():
        scores = mean_scores(draws)
        steady = steadiness(draws)
        top = sorted(scores, key=lambda module: (-scores[module], module))[: max(1, int(0.1 * len(scores) + 0.5))]
        rows.append(
            (
                name,
                agreement(scores, truth).text(1, 2) if truth else "-",
                agreement(scores, default).text(1, 2) if default and name != DEFAULT else "-",
                f"{steady.value:.2f}" if steady else "-",
                ", ".join(module.removeprefix("model.layers.") for module in top),
            )
        )
    return markdown(("score", "with the oracle", "with the default", "between draws", "its choice"), rows)
