"""Problems from local files."""

from typing import Any

from hybrid_lightning.data.columns import TableSource, existing_splits
from hybrid_lightning.data.tables import Table, read_table


class FileSource(TableSource):
    r"""JSONL, JSON, CSV or Parquet files (text also in `.gz`), one for each split.

    Rows of `train` whose question is also in `validation` or `test` are dropped and their number is shown. Splits without a
    file can be split off from `train` by `validation_fraction` and `test_fraction`.

    Args:
        train: Path of the training file; None if there is nothing to train on.
        validation: Path of the validation file.
        test: Path of the test file.
        **columns: Arguments of `TableSource`.

    Example:
        >>> source = FileSource("train.jsonl", test="test.jsonl", answer_pattern=r"####\s*(.+)", validation_fraction=0.1)

        Multiple choice, of rows such as `{"question": "2+2?", "choices": ["3", "4"], "answer": 1}`; the reward is
        `MultipleChoice(options_column="choices")`:

        >>> source = FileSource("questions.jsonl", options_column="choices", validation_fraction=0.1)
    """

    def __init__(self, train: str | None = None, validation: str | None = None, test: str | None = None, **columns: Any) -> None:
        super().__init__(**columns)
        self.paths = existing_splits([("train", train), ("validation", validation), ("test", test)])

    def read_tables(self) -> dict[str, tuple[str, Table]]:
        """Read every file that is given."""
        return {split: (path, read_table(split, path)) for split, path in self.paths}
