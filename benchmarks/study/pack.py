"""Packs records into the single table that git keeps: `python -m benchmarks.study.pack`.

Adds the files that the stages have written since to the packed records. Packed records stay, unless they are dropped by name. A
file that is not a record, or differs from the packed record of its name, is rejected, and nothing is written.
"""

from collections.abc import Iterable

from benchmarks.commands import command
from benchmarks.study.records import Job, Record
from benchmarks.study.store import PACK, Content, Store, add_options, differing, malformed, read, same, store_of, write_pack


def main() -> None:
    parser = add_options(command("study.pack", __doc__))
    told = "first remove these records, such as run/facts/lora/lr=0.005-seed=2.json; files replace them, or the runs are repeated"
    parser.add_argument("--drop", nargs="+", default=[], metavar="NAME", help=told)
    arguments = parser.parse_args()
    store = store_of(arguments)
    records = together(store, arguments.drop)
    write_pack(records, arguments.results / PACK)
    added = sum(name not in store.packed for name in records)
    replaced = sum(name in records for name in arguments.drop)
    gone = len(arguments.drop) - replaced
    print(f"{len(records)} records in {store.pack}: {added} added, {replaced} replaced, {gone} taken out")


def together(store: Store, drop: Iterable[str] = ()) -> dict[str, Content]:
    """The packed records without the dropped ones, and the files."""
    records, problems = dict(store.packed), []
    for name in drop:
        if records.pop(name, None) is None:
            example = next(iter(records), "-")
            raise SystemExit(f"error: {store.pack} has no record {name}; names are paths of files, such as {example}")
    for path in sorted(store.folder.rglob("*.json")):
        name, content = path.relative_to(store.folder).as_posix(), read(path)
        if cause := fault(name, content):
            problems.append(malformed(path, cause))
        elif not same(records.setdefault(name, content), content):
            problems.append(differing(path, name))
    if problems:
        raise SystemExit("\n".join(f"error: {problem}" for problem in problems))
    return records


def fault(name: str, content: Content) -> str:
    """Why the analysis could not read the content of a file of this name; empty if it can."""
    if name.startswith("memory/"):
        return "" if content.get("bytes") else "it has no 'bytes'"
    try:
        record = Record(**content)
        own, _ = Job(**record.job).file, (record.validation, record.accuracy)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return "" if own == name else f"its run belongs to {own}"


if __name__ == "__main__":
    main()
