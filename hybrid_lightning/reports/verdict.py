"""The verdict of a run: whether its policy has learned, by its validations before training and at its end.

Accuracy decides and, where it does not move or nothing says what is right, the reward. One answer to most problems is not
learning, whatever it earns.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_lightning.errors import shorten
from hybrid_lightning.metrics import Difference, Problem, difference

GREEDY, REWARD = "val/greedy_accuracy", "val/reward"


def problem_values(validation: Mapping[str, Any] | None, metric: str) -> dict[Problem, float]:
    """Value of each problem at a validation, as `report.json` has it; empty for metrics without values by problem."""
    column = 3 if metric == GREEDY else 4 if metric == REWARD else 2 if metric.startswith("val/avg@") else None
    rows = (validation or {}).get("problems", ()) if column is not None else ()
    return {(row[0], row[1]): math.nan if row[column] is None else row[column] for row in rows if len(row) > column}


def compare_validations(
    first: Mapping[str, Any] | None, last: Mapping[str, Any] | None, metric: str, paired: bool = True
) -> Difference | None:
    """By how much a metric changed from one validation to another; None if one of them has no values by problem."""
    before, after = problem_values(first, metric), problem_values(last, metric)
    if not before or not after:
        return None
    draws = math.inf if metric == REWARD else 1 if metric == GREEDY else int(metric.rpartition("@")[2])
    return difference(before, after, paired, draws)


def shown_difference(change: Difference, metric: str) -> str:
    """A change with its interval, such as "+12.5 points [+3.1, +21.0]"; accuracies in points, a reward as it is paid."""
    scale, digits, unit = (1, 3, "") if metric == REWARD else (100, 1, " points")
    value, low, high = (f"{scale * number:+.{digits}f}" for number in change[:3])
    return f"{value}{unit}{'' if math.isnan(change.low) else f' [{low}, {high}]'}"


@dataclass(frozen=True)
class Answers:
    """The most frequent answers of a validation: those of its rows, and those of greedy completions."""

    problems: int
    reference: str  # the most frequent reference answer, and number of problems that have it
    reference_count: int
    found: str  # the most frequent answer of completions, the number of these, and of those that are right
    found_count: int
    correct_count: int

    @classmethod
    def of(cls, given: Sequence[tuple[str | None, bool, str | None]]) -> "Answers | None":
        """Count `Evaluation.answers`; None if there are no reference answers."""
        references = Counter(reference for _, _, reference in given if reference is not None).most_common(1)
        if not references:
            return None
        ((answer, count),) = Counter(found for found, _, _ in given if found is not None).most_common(1) or [("", 0)]
        correct = sum(right for found, right, _ in given if found == answer)
        return cls(len(given), *references[0], answer, count, correct)

    def __str__(self) -> str:
        share = self.reference_count / self.problems
        return f"the most frequent reference answer, {shorten(self.reference)}, is right for {share:.1%}"

    @property
    def one_for_all(self) -> bool:
        """Whether one answer is given, wrongly, to most of the problems that have another one."""
        others = self.problems - self.found_count
        return self.reference_count < self.problems and self.found_count - self.correct_count > others


def verdict(accuracy: Difference | None, reward: Difference | None, answers: Answers | None) -> tuple[str, int | None]:
    """Judge a policy by its changes from the validation before training to the one at the end.

    Args:
        accuracy: The change of accuracy; None if it was not measured, or no part of the reward says what is right.
        reward: The change of the reward; None if it was not measured.
        answers: Of the greedy completions at the end; None if they are not known.

    Returns:
        The verdict, and 1 if the policy has learned, -1 if it is worse than at the start, 0 for no change; None if not known.
    """
    if answers is not None and answers.one_for_all:
        return (
            f"one answer to most problems, which is not learning: {shorten(answers.found)} to {answers.found_count} of "
            f"{answers.problems}, right for {answers.correct_count}"
        ), 0
    found = {"accuracy": accuracy, "reward": reward}
    shown = {name: f"{name} {shown_difference(change, f'val/{name}')}" for name, change in found.items() if change is not None}
    directions = {name: change.direction for name, change in found.items() if change is not None}
    if not shown:
        return "not measured, since there is no validation before and after", None
    by = next((name for name, direction in directions.items() if direction), None)
    if by is None:
        return f"no change that is larger than its interval: {', '.join(shown.values())}", 0
    said = "learned" if directions[by] > 0 else "worse than at the start"
    against = [f", though {shown[name]}" for name, direction in directions.items() if direction == -directions[by]]
    still = ", while accuracy did not move" if by == "reward" and accuracy is not None else ""
    return f"{said}: {shown[by]}{still}{''.join(against)}", directions[by]
