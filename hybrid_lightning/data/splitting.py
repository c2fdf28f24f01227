"""Rows and splits, and the rule that no problem is in two splits.

A problem is identified by its question, not by its place in a file. Data sets repeat questions, and a repeated question could end
up both in training and in the test. If the question does not identify the problem, as in a game, `Row.task` does.
"""

import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid_lightning.errors import ConfigError, DataError


@dataclass(frozen=True)
class Row:
    """One problem as a source gives it, before it is formatted into a prompt."""

    question: str  # identifies the problem: must differ from every other problem's question, unless `task` differs
    answer: str | None = None  # the reference answer alone, None if the data has none
    index: int = 0  # number of the row in its source, from 0; unique within a split and set
    source: str = ""  # where the row comes from, for error messages
    columns: dict[str, Any] = field(default_factory=dict)  # the whole row, in plain JSON values, since prompts are pickled
    set_name: str = ""  # set that the row belongs to, where a source joins several (see `Prompt.set_name`)
    set_weight: float | None = None  # weight of that set in training (see `Prompt.set_weight`)
    task: str = ""  # distinguishes problems with the same question, such as a game's seed; the policy does not see it

    @property
    def key(self) -> tuple[str, str]:
        """Key that all copies of a problem have in common (see `problem_key`)."""
        return problem_key(self.question), self.task

    @property
    def place(self) -> str:
        """Where the row comes from, for error messages."""
        return f"{self.source}, row {self.index}"


@dataclass(frozen=True)
class Splits:
    """The rows of a source; a missing split is empty."""

    train: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)


def problem_key(question: str) -> str:
    """Normalize a question, so that copies of a problem have the same key: case, spacing and Unicode form do not count.

    Example:
        >>> problem_key("How  many are there ?") == problem_key("how many are there?")
        True
    """
    spaced = " ".join(unicodedata.normalize("NFKC", question).casefold().split())
    return re.sub(r" (?=[.,;:?!])", "", spaced)


def split_rows(rows: Sequence[Row], validation_fraction: float, test_fraction: float, seed: int) -> Splits:
    """Split rows at random; all copies of a problem go into the same split.

    Args:
        rows: The rows, in any order.
        validation_fraction: Share of the rows for validation.
        test_fraction: Share of the rows for the test.
        seed: Seed of the shuffle that decides which problems go where.

    Returns:
        The splits, each in the order of `rows`. Sizes are exact, except that copies of a problem are never separated.

    Raises:
        ConfigError: If a fraction is out of range, or so small or large that a split would be empty.
    """
    check_fractions(validation_fraction, test_fraction)
    copies: dict[tuple[str, str], list[int]] = defaultdict(list)
    for position, row in enumerate(rows):
        copies[row.key].append(position)
    groups = list(copies.values())
    random.Random(seed).shuffle(groups)
    taken: dict[str, list[int]] = {}
    for name, fraction in (("test", test_fraction), ("validation", validation_fraction)):
        taken[name] = []
        while groups and len(taken[name]) < round(fraction * len(rows)):
            taken[name] += groups.pop()
        if fraction and not taken[name]:
            raise ConfigError(f"{name}_fraction={fraction} of {len(rows)} rows is less than one row; raise {name}_fraction")
    taken["train"] = [position for group in groups for position in group]
    if rows and not taken["train"]:
        raise ConfigError(
            f"validation_fraction={validation_fraction} and test_fraction={test_fraction} leave no row to train on "
            f"({len(rows)} rows, {len(copies)} distinct questions); lower them"
        )
    return Splits(**{name: [rows[position] for position in sorted(positions)] for name, positions in taken.items()})


def check_fractions(validation_fraction: float, test_fraction: float) -> None:
    """Raise ConfigError if a fraction is not a share, or if the two leave nothing to train on."""
    for name, value in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise ConfigError(f"{name}={value}; give a share of the rows between 0 and 1, such as 0.1")
    if validation_fraction + test_fraction >= 1:
        raise ConfigError(
            f"validation_fraction={validation_fraction} and test_fraction={test_fraction} add up to "
            f"{validation_fraction + test_fraction} and leave no rows to train on; their sum must be below 1"
        )


def without_overlap(splits: Splits) -> tuple[Splits, dict[str, int]]:
    """Drop training rows that also occur in validation or test, and validation rows that also occur in test.

    Returns:
        Splits without shared problems, and the number of rows dropped from `train` and from `validation`.

    Raises:
        DataError: If a split loses all its rows.
    """
    test = {row.key for row in splits.test}
    validation = [row for row in splits.validation if row.key not in test]
    held_out = test | {row.key for row in validation}
    train = [row for row in splits.train if row.key not in held_out]
    for name, before, after in (("train", splits.train, train), ("validation", splits.validation, validation)):
        if before and not after:
            raise DataError(
                f"every question of the {name} split ({len(before)} rows, the first from {before[0].source!r}) also occurs in "
                f"a held-out split; give a {name} split with other questions"
            )
    dropped = {"train": len(splits.train) - len(train), "validation": len(splits.validation) - len(validation)}
    return Splits(train=train, validation=validation, test=splits.test), dropped
