"""Read the rows of a local file, and write cells as text in the same way for answers, templates and error messages.

The standard library reads JSON and CSV, and `datasets` reads Parquet. Reading must not change an answer, but the JSON and CSV
readers of `datasets` infer types: they turn the text "2020-01-01" into a timestamp and an integer beyond 64 bits into a rounded
float. They also shift the columns of a CSV file if all its rows have one field too many, and their errors do not name the line.
"""

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from hybrid_lightning.errors import DataError, one_line, shorten

Table = list[dict[str, Any]]  # rows, each column -> cell
EXACT_FLOAT = 2.0**53  # from here on, a float cannot represent every integer


def read_table(name: str, path: str) -> Table:
    """Read a JSONL, JSON, CSV or Parquet file; a `.gz` file is unpacked. Cells of a CSV file are text, exactly as in the file.

    `name` is the name of the parameter that holds the path, which is relative to the working directory.

    Raises:
        DataError: If the file is missing, of another type, malformed (the message names the line) or without rows.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        kind = "is a folder, not a file" if file.is_dir() else "does not exist"
        raise DataError(f"{name}={path!r} {kind} (looked for {file.absolute()}); correct the path")
    suffix, packed = _file_type(file)
    reader = _READERS.get(suffix)
    if reader is None or (packed and suffix == ".parquet"):
        known = ", ".join(sorted(_READERS))
        raise DataError(f"{name}={path!r} has an unknown file type; its name must end in one of {known}, text also in .gz")
    try:
        rows = reader(file, packed)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{name}={path!r} cannot be read: {one_line(error)}; check that it is complete and in UTF-8") from error
    if not rows:
        raise DataError(f"{name}={path!r} has no rows; give a file with at least one")
    return rows


def is_table(file: Path) -> bool:
    """Whether `read_table` can read a file, judged by its name."""
    suffix, packed = _file_type(file)
    return file.is_file() and suffix in _READERS and not (packed and suffix == ".parquet")


def _file_type(file: Path) -> tuple[str, bool]:
    """Suffix of a file without `.gz`, in lower case, and whether it is packed."""
    packed = file.suffix == ".gz"
    return (Path(file.stem) if packed else file).suffix.lower(), packed


def _open(file: Path, packed: bool) -> IO[str]:
    # utf-8-sig: some editors write a byte order mark, which must not become part of the first column's name.
    return (gzip.open if packed else open)(file, "rt", encoding="utf-8-sig", newline="")  # type: ignore[operator,no-any-return]


def _read_jsonl(file: Path, packed: bool) -> Table:
    rows = []
    with _open(file, packed) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip("\r\n"))  # without the line break, an error at the end is reported in this line
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{file}, line {number} is not valid JSON: {error.msg} at column {error.colno}; correct it"
                ) from error
            if not isinstance(row, dict):
                raise DataError(f'{file}, line {number} is {shorten(row)}; it must be a JSON object such as {{"question": ...}}')
            rows.append(row)
    return rows


def _read_json(file: Path, packed: bool) -> Table:
    with _open(file, packed) as stream:
        text = stream.read()
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{file}, {place}: not valid JSON: {error.msg}; name it .jsonl if it has one object per line") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file} must hold a JSON list of objects, not {shorten(rows)}; name it .jsonl if it has one per line")
    return rows


def _read_csv(file: Path, packed: bool) -> Table:
    with _open(file, packed) as stream:
        lines = csv.reader(stream, strict=True)
        try:
            header: list[str] = next(lines, [])
            repeated = {column for column in header if header.count(column) > 1}
            if repeated:
                raise DataError(f"{file}: the first line names a column twice: {', '.join(sorted(repeated))}; rename one of them")
            rows = []
            for cells in filter(None, lines):
                if len(cells) != len(header):
                    raise DataError(
                        f"{file}, line {lines.line_num} has {len(cells)} fields, but the first line names {len(header)} columns; "
                        "put text with commas in double quotes"
                    )
                rows.append(dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            raise DataError(f"{file}, line {lines.line_num} is not valid CSV: {error}; correct it") from error
    return rows


def _read_parquet(file: Path, packed: bool) -> Table:
    from datasets import load_dataset  # slow to import, and only needed here

    try:
        return list(load_dataset("parquet", data_files=str(file), split="train", streaming=True))
    except Exception as error:  # pyarrow and datasets raise a dozen types
        raise DataError(f"{file} is not a readable Parquet file: {one_line(error)}; write it again") from error


_READERS: dict[str, Callable[[Path, bool], Table]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# ---- cells


def to_text(value: Any) -> str:
    """Write a cell (text, number or bool) as text: numbers in one form, without an exponent or a fractional part of zero.

    Raises:
        ValueError: If the value is missing, not finite, too large for a float to be exact, or of another type.

    Example:
        >>> [to_text(value) for value in ("5.0", 5, 5.0, 0.25, 1e-7, True)]
        ['5.0', '5', '5', '0.25', '0.0000001', 'True']
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int)):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"is {value}, which is not a number")
        if abs(value) >= EXACT_FLOAT:
            raise ValueError(f"is {value!r}, which a float cannot represent exactly; write it as text")
        return _without_exponent(Decimal(repr(value)))
    if isinstance(value, Decimal) and value.is_finite():
        return _without_exponent(value)
    if value is None:
        raise ValueError("is missing")
    raise ValueError(f"is a {type(value).__name__}, not text or a number: {shorten(value)}")


def has_image(value: Any) -> bool:
    """Whether a cell is or contains an image, in the form of Hugging Face data sets or of chat messages."""
    if isinstance(value, (list, tuple)):
        return any(map(has_image, value))
    if isinstance(value, dict):
        is_file = value.keys() == {"bytes", "path"}  # a file that has not been decoded
        return is_file or value.get("type") in ("image", "image_url") or any(map(has_image, value.values()))
    return type(value).__module__.startswith("PIL.")


def _without_exponent(number: Decimal) -> str:
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text
