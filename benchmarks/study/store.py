"""Storage of records: at first each in its own file, outside git, then all in one compressed table.

A record is one JSON object. Its name is the path of its file within the folder of the records, such as
`run/facts/lora/lr=0.005-seed=2.json`; in the table it has the same name.
"""

import argparse
import json
import lzma
import os
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

RESULTS = Path("results/study")
FOLDER = Path("runs/study/records")
PACK = "records.jsonl.xz"  # in the folder of the results: a line for each record, {"name": ..., "record": ...}

Content = dict[str, Any]


class Store:
    """The records in a table, which may be missing, and the records in a folder of files, where new records are written."""

    def __init__(self, folder: Path, pack: Path | None = None) -> None:
        self.folder, self.pack = folder, pack

    def __contains__(self, name: str) -> bool:
        return name in self.packed or (self.folder / name).exists()

    @cached_property
    def packed(self) -> dict[str, Content]:
        """The records in the table, by name."""
        return read_pack(self.pack) if self.pack and self.pack.exists() else {}

    @cached_property
    def _packed_by_folder(self) -> dict[str, dict[str, Content]]:
        folders: dict[str, dict[str, Content]] = defaultdict(dict)
        for name, content in self.packed.items():
            folders[str(PurePosixPath(name).parent)][PurePosixPath(name).name] = content
        return folders

    def within(self, folder: str) -> dict[str, Content]:
        """The records of a folder, by the names of their files, in order.

        Raises:
            SystemExit: If a file cannot be read, or differs from the packed record of its name.
        """
        found = dict(self._packed_by_folder.get(folder, {}))
        for path in (self.folder / folder).glob("*.json"):
            content = read(path)
            if not same(found.setdefault(path.name, content), content):
                raise SystemExit(f"error: {differing(path, f'{folder}/{path.name}')}")
        return dict(sorted(found.items()))

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, in order."""
        within = f"{folder}/"
        packed = {name.removeprefix(within).partition("/")[0] for name in self._packed_by_folder if name.startswith(within)}
        return sorted(packed | {path.name for path in (self.folder / folder).glob("*") if path.is_dir()})


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options for the place of the records, which every stage has."""
    parser.add_argument("--records", type=Path, default=FOLDER, help="folder of those not packed yet (default: %(default)s)")
    told = f"folder of tables, figures and the packed {PACK} (default: %(default)s)"
    parser.add_argument("--results", type=Path, default=RESULTS, help=told)
    return parser


def store_of(arguments: argparse.Namespace) -> Store:
    """The store that these options name."""
    return Store(arguments.records, arguments.results / PACK)


def write(content: Any, path: Path) -> None:
    """Write a record atomically."""
    _replace(path, (json.dumps(content, indent=1) + "\n").encode())


def read(path: Path) -> Content:
    """Read a file, which must be a record."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither UTF-8 nor JSON
        raise SystemExit(f"error: {malformed(path, str(error))}") from None
    if not isinstance(content, dict):
        raise SystemExit(f"error: {malformed(path, f'an object was expected, not {type(content).__name__}')}")
    return content


def write_pack(records: Mapping[str, Content], path: Path) -> None:
    """Write a table, sorted by name: the same records give the same bytes."""
    lines = "".join(json.dumps({"name": name, "record": records[name]}) + "\n" for name in sorted(records)).encode()
    if path.exists() and lzma.decompress(path.read_bytes()) == lines:
        return  # another version of liblzma could make other bytes of them
    _replace(path, lzma.compress(lines, preset=9 | lzma.PRESET_EXTREME))


def read_pack(path: Path) -> dict[str, Content]:
    """All records of a table, by name; the table must be complete."""
    records: dict[str, Content] = {}
    try:
        for line in lzma.decompress(path.read_bytes()).splitlines():
            entry = json.loads(line)
            name, content = entry["name"], entry["record"]
            if name in records or not isinstance(content, dict):
                raise ValueError(f"{name} is " + ("there twice" if name in records else "no object"))
            records[name] = content
    except (ValueError, TypeError, KeyError, lzma.LZMAError) as error:
        cause = f"line {len(records) + 1}, {type(error).__name__}: {error}"
        raise SystemExit(f"error: {path} is not a table of records ({cause}); restore it: git checkout {path}") from None
    return records


def same(first: Content, second: Content) -> bool:
    """Whether two records have the same fields and values, types and digits included."""
    return first is second or json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


def differing(path: Path, name: str) -> str:
    """Message about a file and a packed record that should be equal."""
    return (
        f"{path} differs from the packed record of its name; delete the file to keep the packed record, or replace the record: "
        f"python -m benchmarks.study.pack --drop {name}"
    )


def malformed(path: Path, cause: str) -> str:
    """Message about a file that is not a record."""
    return f"{path} is not a record: {cause}; delete it, and its stage makes it again"


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
