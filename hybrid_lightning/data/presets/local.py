"""The files of a split in a local copy of a data set."""

import re
from pathlib import Path

from hybrid_lightning.data.tables import Table, is_table, read_table
from hybrid_lightning.errors import ConfigError, DataError

_SPLIT = re.compile(r"(?:\A|[^a-z])(train|validation|test)(?:[^a-z]|\Z)")  # in the name of a file


def local_split(path: str, subset: str | None, parameter: str, split: str, alone: bool) -> tuple[str, Table]:
    """Read a split: all files with its name in theirs, or the only file there is where `alone`.

    Args:
        path: A file or a folder.
        subset: Of the data set; its folder, where there is one, is taken for the whole.
        parameter: Name of the parameter that names the split, for error messages.
        split: Its name.
        alone: Whether no other split is asked for.

    Returns:
        Where the rows come from, and the rows.

    Raises:
        ConfigError: If the split is a slice.
        DataError: If there is no file for it, or it cannot be read.
    """
    if "[" in split:
        raise ConfigError(f"{parameter}={split!r}: slices are for the hub; of a local copy take max_rows or a fraction")
    place = Path(path).expanduser()
    if subset is not None and (place / subset).is_dir():
        place = place / subset
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if is_table(file) and not _hidden(file.relative_to(place)))
    elif place.is_file():
        files = [place]
    else:
        raise DataError(f"local_path={path!r} does not exist (looked for {place.absolute()}): correct the path")
    named = [file for file in files if (match := _SPLIT.search(file.name.lower())) and match[1] == split]
    for folder in (place, place / "data"):  # rather than subsets, which repeat what the whole has
        named = [file for file in named if file.parent == folder] or named
    if not named and alone and len(files) == 1:
        named = files
    if not named:
        there = ", ".join(file.name for file in files[:8]) or "none that can be read"
        raise DataError(
            f"local_path={path!r} has no file for {parameter}={split!r}: name one {split}.jsonl, .json, .csv or .parquet, or set "
            f"{parameter}=null; the files are {there}"
        )
    rows = [row for file in named for row in read_table("local_path", str(file))]
    return str(named[0] if len(named) == 1 else place), rows


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
