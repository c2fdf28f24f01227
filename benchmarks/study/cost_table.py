"""What each method costs, as Markdown."""

import json
from pathlib import Path
from statistics import median

from benchmarks.study.tables import markdown

COLUMNS = {  # of a record: heading, unit, digits
    "seconds_per_step": ("ms a step", 1e-3, 0),
    "scoring_seconds": ("scoring, s", 1.0, 2),
    "peak_bytes": ("peak of the process, MiB", 2**20, 0),
    "trainable_parameters": ("trained", 1.0, 0),
    "optimizer_bytes": ("optimizer, KiB", 2**10, 0),
    "checkpoint_bytes": ("checkpoint, KiB", 2**10, 0),
}


def cost_table(results: Path) -> str:
    """The median over rounds of every method on every task that was measured."""
    rows = []
    for path in sorted((results / "cost").glob("*.json")):
        for method, rounds in json.loads(path.read_text(encoding="utf-8"))["rounds"].items():
            values = [
                f"{median(measured[name] for measured in rounds) / unit:,.{digits}f}"
                for name, (_, unit, digits) in COLUMNS.items()
            ]
            rows.append((path.stem, method, *values))
    return markdown(("task", "method", *(heading for heading, _, _ in COLUMNS.values())), rows)
