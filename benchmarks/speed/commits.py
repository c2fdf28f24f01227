"""Compares the time of a training step with another checkout: `python -m benchmarks.speed.commits FOLDER`.

    git worktree add ../before COMMIT
    python -m benchmarks.speed.commits ../before --workload main tiny --pairs 10

Steps of both are made in turn (A B A B), so that other work on the machine affects both alike. Prints a table with the median of
the ratios of neighbouring steps, and with the ratio of all steps together: only this counts rare long steps, such as those with a
garbage collection. Besides the workloads of the other comparisons, it runs shipped configs as users run them: only this shows
whether a config no longer gets a fast pass.
"""

import argparse
import statistics
import sys
import tempfile
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.commands import CORES, ROOT, UsageError, check_at_least, command, entry
from benchmarks.pairs import Plan, compare, prepared
from benchmarks.speed import run_config
from benchmarks.tables import table
from benchmarks.workloads import WORKLOADS, Workload

# Each side sees its own checkout, package and benchmarks alike.
_WORKER = """import runpy, sys
sys.path.insert(0, {checkout!r})
import hybrid_lightning
assert hybrid_lightning.__file__.startswith({checkout!r}), hybrid_lightning.__file__
runpy.run_module("benchmarks.speed.run_ours", run_name="__main__")
"""
_SHIPPED_WORKER = """import runpy, sys
sys.path.insert(0, {checkout!r})
runpy.run_path({worker!r})["main"]({checkout!r}, {options!r})
"""
# Configs with their sizes; every step must have exactly these.
SHIPPED = {
    workload.name: workload
    for workload in (
        Workload("gspo", 32, 8, max_new_tokens=20, mean_tokens=None, minibatches=2),
        Workload("tools", 32, 8, max_new_tokens=12, mean_tokens=None, minibatches=2, turns=3),
        Workload("smollm2_addition", 16, 8, max_new_tokens=6, mean_tokens=None),
        Workload("smollm2_mawps", 8, 8, max_new_tokens=16, mean_tokens=None),
    )
}


def build_parser() -> argparse.ArgumentParser:
    parser = command("speed.commits", __doc__, pairs=10, threads=CORES)
    choices, default = [*WORKLOADS, *SHIPPED], ["main", "tiny"]
    parser.add_argument("--workload", nargs="+", default=default, choices=choices, help="or a config (default: %(default)s)")
    parser.add_argument("--before-options", nargs="+", default=[], metavar="NAME=VALUE", help="of configs in the other checkout")
    parser.add_argument("--now-options", nargs="+", default=[], metavar="NAME=VALUE", help="of configs in this checkout")
    parser.add_argument("before", type=Path, help="the other checkout, or this one")
    return parser


def run(arguments: argparse.Namespace) -> None:
    check_at_least(arguments, 1, "pairs", "threads")
    before = arguments.before
    if not (before / "benchmarks/speed/run_ours.py").is_file():
        raise UsageError(f"{before} is not a checkout of this project; make one: git worktree add {before} COMMIT")
    checkouts = {"before": before.resolve(), "now": ROOT}
    names = dict.fromkeys(arguments.workload)
    lines = []
    with tempfile.TemporaryDirectory(prefix="commits_") as logs:
        for made, code in ((WORKLOADS, _WORKER), (SHIPPED, _SHIPPED_WORKER)):
            workloads = [made[name] for name in names if name in made]
            given = {"before": arguments.before_options, "now": arguments.now_options}
            options = {side: [f"--{option}" for option in of_side] for side, of_side in given.items()}
            workers = {
                side: ("-c", code.format(checkout=str(place), worker=run_config.__file__, options=options[side]))
                for side, place in checkouts.items()
            }
            plan = Plan(arguments.pairs, "cpu", arguments.threads, 0, tuple(checkouts), Path(logs), workers=workers)
            with prepared(workloads if made is WORKLOADS else [], plan) as folders:  # a config names its own model and data
                for workload, folder in zip_longest(workloads, folders, fillvalue=plan.logs):
                    lines += _compared(workload, compare(workload, folder, plan)["steps"])
    print(table(["workload", "unit", "before", "now", "now / before (quarters)", "of all steps"], lines, left=2))


def _compared(workload: Workload, steps: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    lines = []
    for unit in ("seconds", "processor_seconds"):
        before, now = ([step[unit] for step in side[1:]] for side in steps.values())  # the first warms up
        ratios = [after / first for first, after in zip(before, now, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        medians = [f"{statistics.median(side):.3f}" for side in (before, now)]
        total = f"{sum(now) / sum(before):.3f}"
        lines.append([f"`{workload.name}`", unit.replace("_", " "), *medians, f"{middle:.3f} ({low:.3f}-{high:.3f})", total])
    return lines


main = entry(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
