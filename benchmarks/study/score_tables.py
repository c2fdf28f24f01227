"""What the records of scoring and of the oracle say about each score."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean

from benchmarks.study.estimates import correlation, rank_correlation
from benchmarks.study.records import of_method
from benchmarks.study.store import Store
from benchmarks.study.tables import markdown

DEFAULT = "PreconditionedTail"
Scores = Mapping[str, float]  # of each module


def read(store: Store, task: str) -> dict[str, list[Scores]]:
    """The scores of every variant, one entry for each calibration draw."""
    return {
        name: [content["scores"] for content in store.within(f"scores/{task}/{name}").values()]
        for name in store.folders(f"scores/{task}")
    }


def oracle(store: Store, task: str) -> list[Scores]:
    """Validation accuracy with each module alone trained fully, one entry for each seed that all modules have.

    Not test accuracy, by which methods are compared: a score is chosen by this.
    """
    runs = {
        module: {r.seed: r.validation for r in of_method(store, "run", task, f"only:{module}")}
        for module in store.folders(f"run/{task}/only")
    }
    common = sorted(set.intersection(*(set(seeds) for seeds in runs.values()))) if runs else []
    return [{module: seeds[seed] for module, seeds in runs.items()} for seed in common]


def mean_scores(draws: Sequence[Scores]) -> dict[str, float]:
    return {module: fmean(draw[module] for draw in draws) for module in draws[0]}


def aligned(first: Scores, second: Scores) -> tuple[list[float], list[float]]:
    """The values of both, module by module."""
    modules = sorted(first)
    return [first[m] for m in modules], [second[m] for m in modules]


def steadiness(draws: Sequence[Scores]) -> float | None:
    """Rank correlation between two calibration draws, mean of all pairs of them; None for a single draw."""
    pairs = [rank_correlation(*aligned(first, second)) for first, second in combinations(draws, 2)]
    return fmean(pairs) if pairs else None


def halves(draws: Sequence[Scores]) -> float | None:
    """Rank correlation between the means of two halves of the draws, mean of all halvings; None for a single draw.

    An order that does not tell itself from chance cannot be foretold by anything.
    """
    if len(draws) < 2:
        return None
    places = set(range(len(draws)))
    splits = [(sorted(half), sorted(places - set(half))) for half in combinations(sorted(places), len(places) // 2)]
    means = [[mean_scores([draws[place] for place in half]) for half in both] for both in splits]
    return fmean(rank_correlation(*aligned(first, second)) for first, second in means)


def of_task(store: Store, task: str) -> str:
    """Each variant: how it agrees with the oracle, with the default score, and with itself on other draws; and its choice."""
    found, seeds = read(store, task), oracle(store, task)
    truth = mean_scores(seeds) if seeds else {}
    default = mean_scores(found[DEFAULT]) if found.get(DEFAULT) else {}
    rows = []
    for name, draws in found.items():
        scores = mean_scores(draws)
        steady = steadiness(draws)
        top = sorted(scores, key=lambda module: (-scores[module], module))[: max(1, int(0.1 * len(scores) + 0.5))]
        rows.append(
            (
                name,
                correlation(*aligned(scores, truth)).text(1, 2) if truth else "-",
                correlation(*aligned(scores, default)).text(1, 2) if default and name != DEFAULT else "-",
                "-" if steady is None else f"{steady:.2f}",
                ", ".join(module.removeprefix("model.layers.") for module in top),
            )
        )
    table = markdown(("score", "with the oracle", "with the default", "between draws", "its choice"), rows)
    own = halves(seeds)
    if own is None:
        return table
    text = f"The oracle has {len(seeds)} seeds; its rank correlation between two halves of them is {own:.2f}."
    return f"{table}\n\n{text}"
