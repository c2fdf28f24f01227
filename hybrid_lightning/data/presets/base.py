"""`PresetSource`: base of the data sets whose columns are known."""

from abc import abstractmethod
from typing import Any, ClassVar

from hybrid_lightning.data.columns import TableSource, existing_splits
from hybrid_lightning.data.hub import read_hub_split
from hybrid_lightning.data.presets.local import local_split
from hybrid_lightning.data.splitting import Row
from hybrid_lightning.data.tables import Table
from hybrid_lightning.errors import DataError


class PresetSource(TableSource):
    """A data set of the hub, or a local copy of it, whose rows a subclass can read.

    Args:
        train_split: Split of the data set to train on; None to train on nothing. Here and below it may be a split that the data
            set has for something else, such as "test", and from the hub a slice of one, such as "test[:90%]".
        validation_split: Split to validate on.
        test_split: Split to test on.
        local_path: A copy to read instead of the hub: a folder, such as a clone of the data set's repository, with files named
            after the splits (`train.jsonl`, `data/test-00000-of-00001.parquet`), or one file. None for the hub, or its cache.
        revision: Branch, tag or commit on the hub; None for the newest.
        max_rows: As in `TableSource`.
        skip_bad_rows: As in `TableSource`.
        validation_fraction: As in `TableSource`.
        test_fraction: As in `TableSource`.
        split_seed: As in `TableSource`.
    """

    hub_path: ClassVar[str]
    hub_name: str | None = None

    def __init__(
        self,
        train_split: str | None,
        validation_split: str | None,
        test_split: str | None,
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
        self.hub_splits = existing_splits(
            [("train_split", train_split), ("validation_split", validation_split), ("test_split", test_split)]
        )

    @abstractmethod
    def question_and_answer(self, columns: dict[str, Any]) -> tuple[str, str | None]:
        """Question and reference answer of a row.

        Raises:
            ValueError: If it has none; the message names the column and what is wrong.
        """

    def read_tables(self) -> dict[str, tuple[str, Table]]:
        """Read every split that is named, from the local copy or the hub."""
        return {parameter.removesuffix("_split"): self._read(parameter, split) for parameter, split in self.hub_splits}

    def _read(self, parameter: str, split: str) -> tuple[str, Table]:
        if self.local_path is not None:
            alone = len({split for _, split in self.hub_splits}) == 1
            return local_split(self.local_path, self.hub_name, parameter, split, alone)
        table = read_hub_split(parameter, split, self.hub_path, self.hub_name, self.revision, self.max_rows)
        return f"{self.hub_path} {split}", table

    def _check_columns(self, source: str, table: Table) -> None:
        """Nothing: copies of a data set name their columns differently, and each row says what it lacks."""

    def _to_row(self, source: str, index: int, columns: dict[str, Any]) -> Row:
        try:
            question, answer = self.question_and_answer(columns)
        except ValueError as error:
            raise DataError(
                f"{source}, row {index} (the first is 0): {type(self).__name__}: {error}; correct or remove the row, or set "
                "skip_bad_rows=true"
            ) from error
        return Row(question, answer, index, source, columns)
