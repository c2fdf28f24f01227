"""Where problems come from: `PromptSource`, the part that a config swaps to train on other data."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from hybrid_lightning.data.splitting import Row, Splits, without_overlap
from hybrid_lightning.errors import DataError
from hybrid_lightning.parts import Part


class PromptSource(Part, ABC):
    """A set of problems in up to three splits.

    A source of one's own implements `read` and nothing else:

    Example:
        >>> class Doubling(PromptSource):
        ...     def __init__(self, size: int = 100) -> None:
        ...         self.size = size
        ...     def read(self) -> Splits:
        ...         rows = [Row(f"2*{n}=", str(2 * n), index=n, source="doubling") for n in range(self.size)]
        ...         return Splits(train=rows[10:], validation=rows[:10])
        >>> splits = Doubling(size=20).load()
        >>> len(splits.train), splits.validation[3].answer
        (10, '6')
    """

    @abstractmethod
    def read(self) -> Splits:
        """Read or make all rows; deterministic, so that every rank and every resumed run gets the same ones."""

    def load(self) -> Splits:
        """Read the splits and make sure that no problem is in two of them.

        Rows of train that ask what validation or test ask, and rows of validation that ask what the test asks, are
        dropped and their number is shown: compared is the question, regardless of case and spacing.

        Returns:
            Splits without a common question.

        Raises:
            DataError: If a split has two rows of the same index, or is left empty by this, or `read` returns something
                else than splits of rows of text.
        """
        splits = self.read()
        _check_types(type(self).__name__, splits)
        for name, rows in vars(splits).items():
            _check_indices(name, rows)
        splits, dropped = without_overlap(splits)
        for name, count in dropped.items():
            if count:
                rank_zero_info(f"{type(self).__name__}: dropped {count} {name} rows whose question is also held out from {name}")
        return splits


def _check_types(name: str, splits: Any) -> None:
    """What a source of one's own easily gets wrong, and what would come out far from there."""
    if not isinstance(splits, Splits):
        raise DataError(f"{name}.read returned a {type(splits).__name__}: return Splits(train=[Row(...), ...], ...)")
    for split, rows in vars(splits).items():
        for position, row in enumerate(rows):
            if not isinstance(row, Row):
                raise DataError(f"{name}.read: {split} row {position} is a {type(row).__name__}: make it a Row(question, answer)")
            for field, allowed in (("question", str), ("answer", (str, type(None)))):
                value = getattr(row, field)
                if not isinstance(value, allowed):
                    raise DataError(f"{name}.read: the {field} of {split} row {position} is {value!r}: give text, as in str(...)")


def _check_indices(name: str, rows: list[Row]) -> None:
    seen: set[tuple[str, int]] = set()
    for row in rows:
        if (row.set_name, row.index) in seen:
            raise DataError(f"two {name} rows from {row.source!r} have the index {row.index}: number them apart")
        seen.add((row.set_name, row.index))
