"""Compares planned with measured memory: `python -m benchmarks.memory.planned`.

Trains two models in several sizes with each method, each in its own process, and writes all numbers as JSON and a table as
Markdown. benchmarks/README.md explains the numbers.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.commands import about, check_at_least, check_can_run, command, entry, environment, run_logged, tell
from benchmarks.memory.cases import CASES, MODELS, ROLLOUTS, MemoryCase
from benchmarks.pairs import Plan, prepared
from benchmarks.tables import table

PARTS = ("weights", "gradients", "optimizer", "cache")
MIB = 2**20


def build_parser() -> argparse.ArgumentParser:
    parser = command("memory.planned", __doc__, threads=1, seed=0, out=Path("runs/memory"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="to measure (default: all)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Plan and measure. Each finished result is written immediately, since everything takes an hour or more."""
    check_at_least(arguments, 1, "threads")
    check_can_run([MODELS[name] for name in arguments.models], "leave it out: --models embedded")
    logs = arguments.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES if case.model in arguments.models]
    result: dict[str, Any] = {**about(arguments), "cases": []}
    for number, case in enumerate(cases, start=1):
        tell(f"{number} of {len(cases)}: {case.model}, {case.name}")
        found = compare(case, logs / f"{number}", arguments)
        result["cases"].append({"case": asdict(case), "name": case.name, **found, **summarize(found)})
        (arguments.out / "memory.json").write_text(json.dumps(result, indent=1))
    text = tables(result["cases"])
    (arguments.out / "memory_plan.md").write_text(text + "\n")
    print(text)
    print(f"\nWritten: {arguments.out / 'memory.json'}, {arguments.out / 'memory_plan.md'}")


def compare(case: MemoryCase, log: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan a case, count its tensors, and measure its process; returns the results of every rank."""
    found, plan = {}, Plan(ROLLOUTS, "cpu", arguments.threads, arguments.seed, (), log.parent)
    with prepared([case.prepared], plan) as (folder,):
        for what in ("plan", "tensors", "process"):
            (out := folder / what).mkdir()
            request = {"case": asdict(case), "folder": str(folder), "threads": arguments.threads, "what": what, "out": str(out)}
            asked = ["-m", "benchmarks.memory.run_memory", json.dumps(request)]
            run_logged(asked, log.with_suffix(f".{what}.log"), {**environment(arguments.threads), "HF_HUB_OFFLINE": "1"})
            found[what] = [json.loads(file.read_text()) for file in sorted(out.iterdir())]
    return found


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """Planned and measured bytes of a case, each the maximum over all moments and ranks.

    For scoring, which holds only the base model, no parts are compared.
    """
    (plan,) = found["plan"]
    counted = [rank["moments"] for rank in found["tensors"]]
    planned = {name: parts["total"] - plan["unseen"][name] for name, parts in plan["moments"].items()}
    measured = {name: max(rank[name]["tensors"] for rank in counted if name in rank) for rank in counted for name in rank}
    sides = (plan["moments"], counted[0])
    trained = [[parts for name, parts in side.items() if name not in ("calibrating", "scoring")] for side in sides]
    return {
        "bytes": [max(planned.values()), max(measured.values())],
        "moments": [max(planned, key=planned.__getitem__), max(measured, key=measured.__getitem__)],
        "resident": [plan["process"], max(rank["process"] for rank in found["process"])],
        "parts": {part: [max(parts[part] for parts in moments) for moments in trained] for part in PARTS},
    }


def difference(pair: Sequence[float]) -> float:
    """Planned minus measured, as a share of the measured value."""
    return pair[0] / pair[1] - 1


def tables(cases: Sequence[dict[str, Any]]) -> str:
    """Tables with a line for each case, and the errors of the plans."""
    rows = []
    for case in cases:
        numbers = []
        for pair in (case["bytes"], case["resident"]):
            numbers += [f"{pair[1] / MIB:,.1f}", f"{difference(pair):+.1%}"]
        rows.append([case["case"]["model"], case["name"], *numbers, " / ".join(dict.fromkeys(case["moments"]))])
    header = ["model", "case", "tensors, MiB", "planned", "process, MiB", "planned", "most while"]
    furthest = [f"{name} {max(abs(difference(case[name])) for case in cases):.0%}" for name in ("bytes", "resident")]
    parts = [pair for case in cases for pair in case["parts"].values()]
    apart = max(abs(planned - measured) for planned, measured in parts) / MIB
    return f"{table(header, rows, left=2)}\n\nFurthest off: {', '.join(furthest)}; any of {', '.join(PARTS)} {apart:.1f} MiB."


main = entry(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
