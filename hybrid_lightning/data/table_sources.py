"""Sources of tables: local files (`FileSource`), the Hugging Face hub (`HubSource`), rows in memory (`RowsSource`)."""

import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from hybrid_lightning.data.columns import TableSource, given_splits
from hybrid_lightning.data.tables import Table, read_table
from hybrid_lightning.errors import DataError, one_line, shorten
from hybrid_lightning.shared.hub import HubRepository, hub_reachable, offline_if_unreachable


class FileSource(TableSource):
    r"""Problems from local JSONL, JSON, CSV or Parquet files (text also in `.gz`), one file per split.

    Training rows that also occur in `validation` or `test` are dropped, and their number is logged. If you have no file for a
    split, `validation_fraction` and `test_fraction` split it off from `train`.

    Args:
        train: Path of the training file; None for no training rows.
        validation: Path of the validation file, if there is one.
        test: Path of the test file, if there is one.
        **columns: Arguments of `TableSource`.

    Example:
        >>> source = FileSource("train.jsonl", test="test.jsonl", answer_pattern=r"####\s*(.+)", validation_fraction=0.1)

        Multiple choice, with rows such as `{"question": "2+2?", "choices": ["3", "4"], "answer": 1}`; the reward is
        `MultipleChoice(options_column="choices")`:

        >>> source = FileSource("questions.jsonl", options_column="choices", validation_fraction=0.1)
    """

    def __init__(self, train: str | None = None, validation: str | None = None, test: str | None = None, **columns: Any) -> None:
        super().__init__(**columns)
        self.paths = given_splits([("train", train), ("validation", validation), ("test", test)])

    def read_tables(self) -> dict[str, tuple[str, Table]]:
        """Read the file of each split that is given."""
        return {split: (path, read_table(split, path)) for split, path in self.paths}


class RowsSource(TableSource):
    r"""Problems from rows in memory: lists of dicts, or a `datasets.Dataset` for each split.

    As in `FileSource`, training rows that also occur in a held-out split are dropped, and fractions are split off.

    Args:
        train: Training rows, each a dict from column to cell; None for no training rows.
        validation: Validation rows, if there are any.
        test: Test rows, if there are any.
        **columns: Arguments of `TableSource`.

    Raises:
        ConfigError: If no split is given.
        DataError: If a split has no rows, or a row is not a dict.

    Example:
        >>> rows = [{"question": f"{a}+2=", "answer": a + 2} for a in range(10)]
        >>> splits = RowsSource(rows, validation_fraction=0.2).load()
        >>> len(splits.train), splits.train[0].question, splits.train[0].answer
        (8, '0+2=', '2')
    """

    def __init__(
        self,
        train: Iterable[dict[str, Any]] | None = None,
        validation: Iterable[dict[str, Any]] | None = None,
        test: Iterable[dict[str, Any]] | None = None,
        **columns: Any,
    ) -> None:
        super().__init__(**columns)
        self.tables = {
            split: list(rows) for split, rows in given_splits([("train", train), ("validation", validation), ("test", test)])
        }
        for split, table in self.tables.items():
            if not table:
                raise DataError(f"RowsSource: {split} has no rows; give at least one row, or leave {split} out")
            for index, row in enumerate(table):
                if not isinstance(row, Mapping):
                    raise DataError(f'RowsSource: {split} row {index} is {shorten(row)}; give dicts such as {{"question": ...}}')
        self._init_args.update({split: f"{len(table)} rows" for split, table in self.tables.items()})  # all a description needs

    def read_tables(self) -> dict[str, tuple[str, Table]]:
        """The rows of each split that is given."""
        return {split: (split, [dict(row) for row in table]) for split, table in self.tables.items()}


class HubSource(TableSource):
    r"""Problems from a data set on the Hugging Face hub, or from a local folder in the same layout.

    Args:
        path: Hub id such as "openai/gsm8k", or a local folder with data files, as `datasets.load_dataset` takes them.
        name: Configuration of the data set, such as "main"; None if it has only one.
        revision: Branch, tag or commit; None for the newest.
        train_split: Name of the split to train on, or a slice such as "train[:90%]"; None for no training rows.
        validation_split: Name of the validation split, if there is one.
        test_split: Name of the test split, if there is one.
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
        self.hub_splits = given_splits(
            [("train_split", train_split), ("validation_split", validation_split), ("test_split", test_split)]
        )

    def read_tables(self) -> dict[str, tuple[str, Table]]:
        """Read each split that is named; downloads what is not in the cache."""
        return {
            parameter.removesuffix("_split"): (f"{self.path} {split}", self._read(parameter, split))
            for parameter, split in self.hub_splits
        }

    def _read(self, parameter: str, split: str) -> Table:
        return read_hub_split(parameter, split, self.path, self.name, self.revision, self.max_rows)


def read_hub_split(
    parameter: str, split: str, path: str, name: str | None = None, revision: str | None = None, max_rows: int | None = None
) -> Table:
    """Read one split of a data set, or a slice of one, from a local folder, the hub or its cache.

    `parameter` names the split in error messages; the others are arguments of `HubSource`.

    Raises:
        DataError: If the split cannot be loaded, or has no rows.
    """
    import datasets  # slow to import, and only needed here

    local = Path(path).expanduser()
    if path.startswith((".", "/", "~")) and not local.exists():
        raise DataError(f"path={path!r} does not exist (looked for {local.absolute()}); correct it, or give a hub id OWNER/NAME")
    hub = (
        None if local.exists() else HubRepository("data set", path, revision, "revision", str(datasets.config.HF_DATASETS_CACHE))
    )
    try:
        with offline_if_unreachable() if hub else nullcontext():
            data = datasets.load_dataset(path if hub else str(local), name, revision=revision, split=split)
        table = list(data.select(range(min(max_rows or len(data), len(data)))))
    except Exception as error:  # datasets, huggingface_hub and pyarrow raise dozens of types
        raise DataError(_explain(error, parameter, split, path, name, hub)) from error
    if not table:
        raise DataError(f"{parameter}={split!r} of data set {path!r} has no rows; name a split with at least one")
    if hub is not None and revision is not None and not hub_reachable():
        _check_revision(hub, data)
    return table


def _check_revision(hub: HubRepository, data: Any) -> None:
    """Reject a cached data set of another revision: offline, `datasets` loads the last used revision, whatever was requested."""
    assert hub.revision is not None
    kept = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=hub.id, repo_type="dataset"), "refs", hub.revision)
    commit = kept.read_text() if kept.is_file() else hub.revision
    if not all(commit in Path(file["filename"]).parts for file in data.cache_files):
        raise DataError(hub.not_in_cache())


# Message of `datasets` about a mistake in the config -> message that names the remedy.
_DATASETS_MESSAGES = (
    (
        r"BuilderConfig '.*?' not found\. Available: \[(.*?)\]",
        "data set {path!r} has no configuration name={name!r}; give one of {choices}",
    ),
    (
        r"Config name is missing\..*?configs: \[(.*?)\]",
        "data set {path!r} has several configurations; set name to one of {choices}",
    ),
    (
        r"Couldn't find cache for .*? for config .*?Available configs in the cache: \[(.*?)\]",
        "the cache has no configuration name={name!r} of data set {path!r}, and the hub cannot be reached; correct it to one of "
        "{choices}, or download it",
    ),
    (
        r'Unknown split ".*?"\. Should be one of \[(.*?)\]',
        "{parameter}={split!r}: data set {path!r} has no such split; it has {choices}; correct {parameter}, or set it to null",
    ),
    (
        r"Dataset scripts are no longer supported",
        "data set {path!r} is a loading script, which `datasets` no longer runs; set revision=refs/convert/parquet, where the "
        "hub keeps most of these data sets as files, or use another data set",
    ),
    (
        r"doesn't contain any data files|No \(supported\) data files found|Couldn't infer the same data file format",
        "data set {path!r} has no readable data files, such as Parquet or JSON Lines; use another data set",
    ),
)


def _explain(error: Exception, parameter: str, split: str, path: str, name: str | None, hub: HubRepository | None) -> str:
    text = one_line(error)
    for pattern, message in _DATASETS_MESSAGES:
        match = re.search(pattern, text)
        if match is not None:
            choices = (match[1] if match.groups() else "").replace("'", "")
            return message.format(parameter=parameter, split=split, path=path, name=name, choices=choices)
    explained = None
    if hub is not None and type(error).__name__ == "DatasetNotFoundError":
        explained = hub.not_found()
        if "gated" in text:
            explained = hub.gated()
        elif text.startswith("Revision"):
            explained = hub.no_revision()
    elif hub is not None:
        explained = hub.explain(error)
    return explained or (
        f"{parameter}={split!r} of data set {path!r} cannot be loaded: {type(error).__name__}: {text}; check path, name, "
        "split and revision (at refs/convert/parquet the hub has most data sets as files)"
    )
