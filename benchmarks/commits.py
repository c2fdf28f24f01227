"""Compares the time of a training step with that of another checkout of this project: `python benchmarks/commits.py FOLDER`.

    git worktree add ../before COMMIT
    python benchmarks/commits.py ../before --workload main tiny --pairs 10

Steps of both are made in turn (A B A B), so that what else the machine does falls on both alike. Prints a table; the ratio is the
median of those of neighbouring steps.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands import UsageError, tell
from pairs import HERE, BenchmarkError, Plan, compare, prepare
from workloads import WORKLOADS

# Each side sees its own checkout, package and benchmarks alike.
_WORKER = """import runpy, sys
sys.path[:1] = [{checkout!r}, {benchmarks!r}]
import hybrid_lightning
assert hybrid_lightning.__file__.startswith({checkout!r}), hybrid_lightning.__file__
runpy.run_path({benchmarks!r} + "/run_ours.py", run_name="__main__")
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="commits.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=["main", "tiny"])
    parser.add_argument("--pairs", type=int, default=10, help="measured steps of each side, after one that is discarded")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side; default: all cores")
    return parser.parse_args(arguments)


def check(arguments: argparse.Namespace) -> None:
    """Find out what cannot work before anything is loaded.

    Raises:
        UsageError: With the remedy.
    """
    for name in ("pairs", "threads"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if not (arguments.before / "benchmarks" / "run_ours.py").is_file():
        raise UsageError(
            f"{arguments.before} is no checkout of this project: make one by git worktree add {arguments.before} COMMIT"
        )


def run(arguments: argparse.Namespace) -> str:
    """Measure, and put the results into a table."""
    lines = ["| workload | unit | before | now | now / before (quarters) |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory(prefix="commits_") as name:
        folder = Path(name)
        scripts = {}
        for side, checkout in (("before", arguments.before.resolve()), ("now", HERE.parent)):
            scripts[side] = folder / f"{side}.py"
            text = _WORKER.format(checkout=str(checkout), benchmarks=str(checkout / "benchmarks"))
            scripts[side].write_text(text, encoding="utf-8")
        plan = Plan(arguments.pairs, "cpu", arguments.threads, 0, ("before", "now"), folder, scripts=scripts)
        workloads = [WORKLOADS[name] for name in dict.fromkeys(arguments.workload)]
        for workload, prepared in zip(workloads, prepare(workloads, folder, plan), strict=True):
            steps = compare(workload, prepared, plan, tell)["steps"]
            for unit in ("seconds", "processor_seconds"):
                lines.append(f"| `{workload.name}` | {unit.replace('_', ' ')} | {_row(steps, unit)} |")
    return "\n".join(lines)


def _row(steps: dict[str, Any], unit: str) -> str:
    before, now = ([step[unit] for step in steps[side][1:]] for side in ("before", "now"))  # the first warms up
    ratios = [after / first for first, after in zip(before, now, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{statistics.median(before):.3f} | {statistics.median(now):.3f} | {middle:.3f} ({low:.3f}-{high:.3f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 2 if it cannot begin, 1 if something fails on the way."""
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        check(parsed)
        print(run(parsed))
    except (UsageError, BenchmarkError) as error:
        tell(f"commits.py: {error}")
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
