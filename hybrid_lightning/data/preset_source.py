r"""`PresetSource`: base of the data sets with known columns, read from the hub or from a local copy.

Helpers for subclasses: `cell_text` reads the first existing column of several names, since copies of a data set name their
columns differently, and `boxed_answer` extracts the answer from the last `\boxed{}` of a solution.
"""

import re
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from hybrid_lightning.data.columns import TableSource, given_splits, row_error
from hybrid_lightning.data.splitting import Row
from hybrid_lightning.data.table_sources import read_hub_split
from hybrid_lightning.data.tables import Table, is_table, read_table, to_text
from hybrid_lightning.errors import ConfigError, DataError, shorten

_SPLIT_IN_NAME = re.compile(r"(?:\A|[^a-z])(train|validation|test)(?:[^a-z]|\Z)")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[^\s{}$]+))")


class PresetSource(TableSource):
    """A data set with known columns, from the hub or from a local copy.

    Args:
        train_split: Name of the data set's split to train on; None for no training rows. Here and below, "auto" is the split that
            the data set has for this use, as listed in `data/presets.py`. Any other split of the data set also works, such as
            "test", and from the hub a slice of a split, such as "test[:90%]".
        validation_split: Name of the split to validate on; None for no validation rows.
        test_split: Name of the split to test on; None for no test rows.
        local_path: Copy to read instead of the hub: a folder, such as a clone of the data set's repository, with files named
            after the splits (`train.jsonl`, `data/test-00000-of-00001.parquet`), or one file. None reads from the hub or its
            cache.
        revision: Branch, tag or commit on the hub; None for the newest.
        max_rows: As in `TableSource`.
        skip_bad_rows: As in `TableSource`.
        validation_fraction: As in `TableSource`.
        test_fraction: As in `TableSource`.
        split_seed: As in `TableSource`.
    """

    hub_path: ClassVar[str]  # id of the data set
    hub_name: str | None = None  # its configuration; None: the default one
    splits: ClassVar[dict[str, str]]  # train, validation or test -> the data set's split for it, where it has one

    def __init__(
        self,
        train_split: str | None = "auto",
        validation_split: str | None = "auto",
        test_split: str | None = "auto",
        local_path: str | None = None,
        revision: str | None = None,
        max_rows: int | None = None,
        skip_bad_rows: bool = False,
        validation_fraction: float = 0.0,
        test_fraction: float = 0.0,
        split_seed: int = 0,
    ) -> None:
        super().__init__(
            max_rows=max_rows,
            skip_bad_rows=skip_bad_rows,
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            split_seed=split_seed,
        )
        self.local_path = local_path
        self.revision = revision
        named = {"train": train_split, "validation": validation_split, "test": test_split}
        self.hub_splits = given_splits(
            [(f"{use}_split", self.splits.get(use) if split == "auto" else split) for use, split in named.items()]
        )

    @abstractmethod
    def question_and_answer(self, columns: dict[str, Any]) -> tuple[str, str | None]:
        """Read question and reference answer from the columns of a row.

        Raises:
            ValueError: If a column is missing or unusable; the message names the column and the fault.
        """

    def read_tables(self) -> dict[str, tuple[str, Table]]:
        """Read each split that is named, from the local copy or the hub."""
        return {parameter.removesuffix("_split"): self._read(parameter, split) for parameter, split in self.hub_splits}

    def _read(self, parameter: str, split: str) -> tuple[str, Table]:
        if self.local_path is not None:
            alone = len({split for _, split in self.hub_splits}) == 1
            return read_local_split(self.local_path, self.hub_name, parameter, split, alone)
        table = read_hub_split(parameter, split, self.hub_path, self.hub_name, self.revision, self.max_rows)
        return f"{self.hub_path} {split}", table

    def _check_columns(self, source: str, table: Table) -> None:
        """Check nothing: copies of a data set name their columns differently, and errors of rows name the missing columns."""

    def _to_row(self, source: str, index: int, columns: dict[str, Any]) -> Row:
        with row_error(f"{source}, row {index} (the first is 0): {type(self).__name__}:"):
            question, answer = self.question_and_answer(columns)
        return Row(question, answer, index, source, columns)


def read_local_split(path: str, subset: str | None, parameter: str, split: str, alone: bool) -> tuple[str, Table]:
    """Read a split from a local copy of a data set, a file or a folder; returns where its rows come from, and the rows.

    Reads all files with the split in their name, from the folder of the `subset` if there is one. If this is the only split to
    read (`alone`), a single file may have any name. `parameter` names the split in error messages.

    Raises:
        ConfigError: If the split is a slice.
        DataError: If the split's file is missing, or cannot be read.
    """
    if "[" in split:
        raise ConfigError(f"{parameter}={split!r}: slices work only on the hub; for a local copy set max_rows or a fraction")
    place = Path(path).expanduser()
    if subset is not None and (place / subset).is_dir():
        place = place / subset
    if place.is_dir():
        tables = sorted(file for file in place.rglob("*") if is_table(file))
        files = [file for file in tables if not any(part.startswith(".") for part in file.relative_to(place).parts)]
    elif place.is_file():
        files = [place]
    else:
        raise DataError(f"local_path={path!r} does not exist (looked for {place.absolute()}); correct the path")
    named = [file for file in files if (match := _SPLIT_IN_NAME.search(file.name.lower())) and match[1] == split]
    for folder in (place, place / "data"):  # preferred to folders of subsets, which repeat the same rows
        named = [file for file in named if file.parent == folder] or named
    if not named and alone and len(files) == 1:
        named = files
    if not named:
        there = ", ".join(file.name for file in files[:8]) or "none that can be read"
        raise DataError(
            f"local_path={path!r} has no file for {parameter}={split!r}; name one {split}.jsonl, .json, .csv or .parquet, or set "
            f"{parameter}=null; the files are {there}"
        )
    rows = [row for file in named for row in read_table("local_path", str(file))]
    return str(named[0] if len(named) == 1 else place), rows


def cell_text(columns: dict[str, Any], *names: str) -> str:
    """Text of a row's cell, in the first of the named columns that the row has.

    Raises:
        ValueError: If the row has none of the columns, or the cell is missing, empty or neither text nor number.
    """
    name = next((name for name in names if name in columns), None)
    if name is None:
        wanted = " or ".join(map(repr, names))
        raise ValueError(f"there is no column {wanted}; the columns are {', '.join(columns) or 'none'}")
    try:
        text = to_text(columns[name]).strip()
    except ValueError as error:
        raise ValueError(f"column {name!r} {error}") from error
    if not text:
        raise ValueError(f"column {name!r} is empty")
    return text


def boxed_answer(columns: dict[str, Any], *names: str) -> str:
    r"""Content of the last `\boxed{}` of a solution, in the first of the named columns that the row has.

    Raises:
        ValueError: If the row has none of the columns, or the cell has no `\boxed{}`.
    """
    solution = cell_text(columns, *names)
    answer = last_boxed(solution)
    if not answer:
        raise ValueError(rf"the solution has no \boxed{{}} with an answer: {shorten(solution)}")
    return answer


def last_boxed(text: str) -> str | None:
    r"""Content of the last closed `\boxed{}`, which may contain braces; None if there is none.

    Example:
        >>> last_boxed(r"First \boxed{1}, then $\boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
    """
    for match in reversed(list(_BOX.finditer(text))):
        if match["bare"]:
            return match["bare"].rstrip(".,")
        depth = 1
        for position in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[match.end() : position].strip()
    return None
