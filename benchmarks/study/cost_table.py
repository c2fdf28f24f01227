"""What each method costs, as Markdown."""

from statistics import median

from benchmarks.study.store import Store
from benchmarks.study.tables import markdown

COLUMNS = {  # of a record: heading, unit, digits
    "seconds_per_step": ("ms a step", 1e-3, 0),
    "scoring_seconds": ("scoring, s", 1.0, 2),
    "peak_bytes": ("peak of the process, MiB", 2**20, 0),
    "trainable_parameters": ("trained", 1.0, 0),
    "optimizer_bytes": ("optimizer, KiB", 2**10, 0),
    "checkpoint_bytes": ("checkpoint, KiB", 2**10, 0),
}


def cost_table(store: Store) -> str:
    """The median over rounds of every method on every task that was measured."""
    rows = []
    for name, content in store.within("cost").items():
        for method, rounds in content["rounds"].items():
            values = [
                f"{median(measured[name] for measured in rounds) / unit:,.{digits}f}"
                for name, (_, unit, digits) in COLUMNS.items()
            ]
            rows.append((name.removesuffix(".json"), method, *values))
    return markdown(("task", "method", *(heading for heading, _, _ in COLUMNS.values())), rows)
