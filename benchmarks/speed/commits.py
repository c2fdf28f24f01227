"""Compares the time of a training step with that of another checkout: `python -m benchmarks.speed.commits FOLDER`.

    git worktree add ../before COMMIT
    python -m benchmarks.speed.commits ../before --workload main tiny --pairs 10

Steps of both are made in turn (A B A B), so that what else the machine does falls on both alike. Prints a table; the ratio is the
median of those of neighbouring steps.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.commands import CORES, ROOT, UsageError, check_at_least, command, entry
from benchmarks.pairs import Plan, compare, prepare
from benchmarks.tables import table
from benchmarks.workloads import WORKLOADS

# Each side sees its own checkout, package and benchmarks alike. Until `7d39560` the worker lay in benchmarks/ itself.
_WORKER = """import pathlib, runpy, sys
checkout = {checkout!r}
sys.path[:0] = [checkout, checkout + "/benchmarks"]
import hybrid_lightning
assert hybrid_lightning.__file__.startswith(checkout), hybrid_lightning.__file__
former = pathlib.Path(checkout, "benchmarks", "run_ours.py")
if former.is_file():
    runpy.run_path(str(former), run_name="__main__")
else:
    del sys.path[1]
    runpy.run_module("benchmarks.speed.run_ours", run_name="__main__")
"""


def build_parser() -> argparse.ArgumentParser:
    parser = command("speed.commits", __doc__, pairs=10, threads=CORES, workload=["main", "tiny"])
    parser.add_argument("before", type=Path, help="the other checkout")
    return parser


def run(arguments: argparse.Namespace) -> None:
    check_at_least(arguments, 1, "pairs", "threads")
    benchmarks = arguments.before / "benchmarks"
    if not any((benchmarks / worker).is_file() for worker in ("speed/run_ours.py", "run_ours.py")):
        raise UsageError(
            f"{arguments.before} is no checkout of this project: make one by git worktree add {arguments.before} COMMIT"
        )
    checkouts = {"before": arguments.before.resolve(), "now": ROOT}
    workers = {side: ("-c", _WORKER.format(checkout=str(checkout))) for side, checkout in checkouts.items()}
    lines = []
    with tempfile.TemporaryDirectory(prefix="commits_") as name:
        folder = Path(name)
        plan = Plan(arguments.pairs, "cpu", arguments.threads, 0, tuple(checkouts), folder, workers=workers)
        workloads = [WORKLOADS[name] for name in dict.fromkeys(arguments.workload)]
        for workload, prepared in zip(workloads, prepare(workloads, folder, plan), strict=True):
            steps = compare(workload, prepared, plan)["steps"]
            for unit in ("seconds", "processor_seconds"):
                before, now = ([step[unit] for step in steps[side][1:]] for side in checkouts)  # the first warms up
                ratios = [after / first for first, after in zip(before, now, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
                medians = [f"{statistics.median(side):.3f}" for side in (before, now)]
                lines.append([f"`{workload.name}`", unit.replace("_", " "), *medians, f"{middle:.3f} ({low:.3f}-{high:.3f})"])
    print(table(["workload", "unit", "before", "now", "now / before (quarters)"], lines, left=2))


main = entry(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
