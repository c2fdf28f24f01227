"""The verdict of a run: whether its policy has learned, from its validations before training and at its end.

Accuracy decides; if it does not change, or if correctness is not measured, the reward decides. One answer to most problems is not
learning, unless the policy got worse: then it is what is left of a policy that moved too far.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from hybrid_lightning.errors import shorten
from hybrid_lightning.metrics import Difference, Problem, confidence_interval, difference

GREEDY, REWARD = "val/greedy_accuracy", "val/reward"
_VISIBLE = 0.1  # share of rows with one answer, from which on giving only this answer pays visibly


def problem_values(validation: Mapping[str, Any] | None, metric: str) -> dict[Problem, float]:
    """Value of each problem at a validation, as in `report.json`; empty for metrics without values by problem."""
    column = {GREEDY: 3, REWARD: 4}.get(metric, 2)
    rows = (validation or {}).get("problems", ()) if column > 2 or metric.startswith("val/avg@") else ()
    return {(row[0], row[1]): math.nan if row[column] is None else row[column] for row in rows if len(row) > column}


def compare_validations(
    first: Mapping[str, Any] | None, last: Mapping[str, Any] | None, metric: str, paired: bool = True
) -> Difference | None:
    """The change of a metric from one validation to another; None if one of them has no values by problem."""
    before, after = problem_values(first, metric), problem_values(last, metric)
    if not before or not after:
        return None
    draws = math.inf if metric == REWARD else 1 if metric == GREEDY else int(metric.rpartition("@")[2])
    return difference(before, after, paired, draws)


def shown_difference(change: Difference, metric: str) -> str:
    """A change with its interval, such as "+12.5 points [+3.1, +21.0]"; accuracies in points, a reward in its own unit."""
    scale, digits, unit = (1, 3, "") if metric == REWARD else (100, 1, " points")
    value, low, high = (f"{scale * number:+.{digits}f}" for number in change[:3])
    return f"{value}{unit}{'' if math.isnan(change.low) else f' [{low}, {high}]'}"


def most_frequent(given: Sequence[tuple[str | None, bool, str | None]]) -> dict[str, Any]:
    """The most frequent answers in rows and in greedy completions, from `Evaluation.answers`; empty if rows have no answers.

    Returns:
        `reference`, the most frequent reference answer, the `share` of problems that have it, and `one_answer`: if one answer
        dominates (most problems get it, by the 95% interval of its share, and most of the problems with a different answer),
        a sentence about that, else "". Then `given` is the reference answer for which it is right, "" if it is never right.
    """
    references = Counter(reference for _, _, reference in given if reference is not None).most_common(1)
    if not references:
        return {}
    ((found, count),) = Counter(found for found, _, _ in given if found is not None).most_common(1) or [("", 0)]
    rights = [reference for text, correct, reference in given if text == found and correct]
    share, dominates = references[0][1] / len(given), _share(count, len(given))[0] > 0.5
    said = f"one answer to most problems, which is not learning: {shorten(found)} to {count} of {len(given)}, "
    said = f"{said}right for {len(rights)}" if share < 1 and dominates and count - len(rights) > len(given) - count else ""
    named = Counter(filter(None, rights)).most_common(1) if said else ()
    return {"reference": references[0][0], "share": share, "one_answer": said, "given": named[0][0] if named else ""}


def unequal_rows(answer: str, answers: Iterable[str | None]) -> str:
    """Whether clearly more rows have an answer than if all answers had the same number of rows.

    Args:
        answer: The answer.
        answers: The answer of each row.

    Returns:
        A text such as "75% of 400 rows have '4'"; "" if the 95% interval of the answer's share contains an equal share, or if so
        few rows have the answer that giving it everywhere would hardly pay.

    Example:
        >>> unequal_rows("4", ["4", "4", "4", "5"] * 100), unequal_rows("4", ["4", "5"] * 100)
        ("75% of 400 rows have '4'", '')
    """
    rows = Counter(known.strip() for known in answers if known is not None)
    count, total = rows[answer.strip()], rows.total()
    if not count or _share(count, total)[0] <= max(_VISIBLE, 1 / len(rows)):
        return ""
    return f"{count / total:.0%} of {total} rows have {shorten(answer)}"


def _share(count: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share."""
    return confidence_interval([torch.arange(total, dtype=torch.float64).lt(count).double()], draws=1)


def verdict(accuracy: Difference | None, reward: Difference | None) -> tuple[str, int | None]:
    """Judge a policy by its changes from the validation before training to the one at the end.

    Args:
        accuracy: The change of accuracy; None if it was not measured, or if no part of the reward measures correctness.
        reward: The change of the reward; None if it was not measured.

    Returns:
        The verdict, and 1 if the policy has learned, -1 if it is worse than at the start, 0 for no change; None if not known.
    """
    found = {name: change for name, change in (("accuracy", accuracy), ("reward", reward)) if change is not None}
    shown = {name: f"{name} {shown_difference(change, f'val/{name}')}" for name, change in found.items()}
    directions = {name: change.direction for name, change in found.items()}
    if not shown:
        return "not measured, since there is no validation before and after", None
    by = next((name for name, direction in directions.items() if direction), None)
    first = by or next(iter(shown))
    measured = f"{shown.pop(first)} on {found[first].problems} problems"
    if by is None:
        return f"no change that is larger than its interval: {', '.join([measured, *shown.values()])}", 0
    said = "learned" if directions[by] > 0 else "worse than at the start"
    if by == "reward":
        beside = ", while accuracy did not move" if accuracy is not None else ""
    else:
        against = directions.get("reward") == -directions[by]
        beside = "".join(f", {'though ' if against else ''}{text}" for text in shown.values())
    return f"{said}: {measured}{beside}", directions[by]
