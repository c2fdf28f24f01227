"""Problems from a data set on the Hugging Face hub, or from a local folder in its layout."""

from typing import Any

from hybrid_lightning.data.columns import TableSource, existing_splits
from hybrid_lightning.data.tables import Table
from hybrid_lightning.data.values import one_line
from hybrid_lightning.errors import DataError


class HubSource(TableSource):
    r"""A data set that `datasets.load_dataset` finds.

    Args:
        path: Hub id such as "openai/gsm8k", or a local folder with data files.
        name: Configuration of the data set, such as "main"; None if it has only one.
        revision: Branch, tag or commit; None for the newest.
        train_split: Name of the split to train on, slices such as "train[:90%]" included; None to train on nothing.
        validation_split: Name of the validation split.
        test_split: Name of the test split.
        **columns: Arguments of `TableSource`.

    Example:
        >>> source = HubSource("openai/gsm8k", "main", test_split="test", answer_pattern=r"####\s*(.+)")
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        revision: str | None = None,
        train_split: str | None = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        **columns: Any,
    ) -> None:
        super().__init__(**columns)
        self.path = path
        self.name = name
        self.revision = revision
        self.hub_splits = existing_splits(
            [("train_split", train_split), ("validation_split", validation_split), ("test_split", test_split)]
        )

    def read_tables(self) -> dict[str, tuple[str, Table]]:
        """Download what the cache does not have, and read every split that is named."""
        return {
            parameter.removesuffix("_split"): (f"{self.path} {split}", self._read(parameter, split))
            for parameter, split in self.hub_splits
        }

    def _read(self, parameter: str, split: str) -> Table:
        return read_hub_split(parameter, split, self.path, self.name, self.revision, self.max_rows)


def read_hub_split(
    parameter: str, split: str, path: str, name: str | None = None, revision: str | None = None, max_rows: int | None = None
) -> Table:
    """Read one split of a data set, from the hub or its cache.

    Args:
        parameter: Name of the parameter that names the split, for error messages.
        split: Its name, or a slice of it.
        path: Hub id or local folder.
        name: Configuration of the data set.
        revision: Branch, tag or commit.
        max_rows: Read only the first so many rows.

    Raises:
        DataError: If it cannot be loaded, or has no rows.
    """
    from datasets import load_dataset  # slow to import, and only needed here

    where = f"{parameter}={split!r} of data set {path!r}"
    try:
        data = load_dataset(path, name, revision=revision, split=split)
        table = list(data.select(range(min(max_rows or len(data), len(data)))))
    except Exception as error:  # datasets, huggingface_hub and pyarrow raise dozens of types
        raise DataError(
            f"{where} cannot be loaded: {type(error).__name__}: {one_line(error)}; check path, name, revision and split, "
            "and that the hub can be reached or the data set is in the cache"
        ) from error
    if not table:
        raise DataError(f"{where} has no rows: name a split with at least one")
    return table
