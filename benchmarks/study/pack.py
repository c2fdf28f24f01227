"""Packs records into the one table that git keeps: `python -m benchmarks.study.pack`.

Adds the files that the stages have written since to those that are packed already. What is packed stays, unless it is dropped by
its name; a file that is no record, or another one than that packed under its name, is refused and nothing is written.
"""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.study.records import Job, Record
from benchmarks.study.store import Store, add_options, differing, malformed, read, same, store_of, write, write_pack

# What the analysis wants of the records of a stage; those of the other stages are runs.
FIELD = {"scores": "scores", "cost": "rounds", "updates": "tails", "memory": "bytes"}
STAGES = ("run", "sweep", "trial", "frontier", *FIELD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument(
        "--drop",
        nargs="+",
        default=[],
        metavar="NAME",
        help="take these out first, such as run/facts/lora/lr=0.005-seed=2.json: files take their places, or runs are made again",
    )
    parser.add_argument("--unpack", type=Path, metavar="FOLDER", help="write all packed records as files again, and pack nothing")
    arguments = parser.parse_args()
    store = store_of(arguments)
    if arguments.unpack:
        print(f"{unpack(store.packed, arguments.unpack)} records in {arguments.unpack}")
        return
    before = store.packed
    records = together(store, arguments.drop)
    write_pack(records, store.pack)
    added = sum(name not in before for name in records)
    replaced = sum(name in records for name in arguments.drop)
    gone = len(arguments.drop) - replaced
    print(f"{len(records)} records in {store.pack}: {added} added, {replaced} replaced, {gone} taken out")


def together(store: Store, drop: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """The packed records but those that are dropped, and the files.

    Raises:
        SystemExit: If a file is no record, or another one than that packed; all of them are named.
    """
    records, problems = dict(store.packed), []
    for name in drop:
        if name not in records:
            example = next(iter(records), "-")
            raise SystemExit(f"error: {store.pack} has no record {name}; names are paths of files, such as {example}")
        file = store.folder / name
        if file.exists() and same(read(file), records[name]):
            raise SystemExit(f"error: {file} is what {store.pack} has; delete it first, or it would be packed again")
        del records[name]
    for path in sorted(path for stage in STAGES for path in (store.folder / stage).rglob("*.json")):
        name, content = path.relative_to(store.folder).as_posix(), read(path)
        if cause := fault(name, content):
            problems.append(malformed(path, cause))
        elif not same(records.setdefault(name, content), content):
            problems.append(differing(path, name))
    if problems:
        raise SystemExit("\n".join(f"error: {problem}" for problem in problems))
    return records


def fault(name: str, content: dict[str, Any]) -> str:
    """Why the analysis could not read what a file of this name has; empty if it can."""
    stage = name.partition("/")[0]
    if stage in FIELD:
        return "" if content.get(FIELD[stage]) else f"it lacks {FIELD[stage]!r}"
    try:
        record = Record(**content)
        own, _ = Job(**record.job).file, (record.validation, record.accuracy)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return "" if own == name else f"its run belongs to {own}"


def unpack(records: Mapping[str, dict[str, Any]], folder: Path) -> int:
    """Write records as files.

    Returns:
        Their number.

    Raises:
        SystemExit: If a file is there and is another one.
    """
    for name, content in records.items():
        if (path := folder / name).exists() and not same(read(path), content):
            raise SystemExit(f"error: {path} differs from the packed record of its name; give another folder")
    for name, content in records.items():
        write(content, folder / name)
    return len(records)


if __name__ == "__main__":
    main()
