"""Compares a training step of hybrid_lightning with one of TRL's GRPOTrainer and PEFT: `python -m benchmarks.speed.vs_trl`.

Prints a table, and writes all measurements as JSON and a figure as PNG. benchmarks/README.md explains the numbers.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.commands import CORES, UsageError, about, check_at_least, check_can_run, command, entry
from benchmarks.pairs import Plan, compare, prepared
from benchmarks.tables import shown, spread, summarize_side, table, yes
from benchmarks.workloads import SMOLLM2, WORKLOADS, Workload

NEEDS_TRL = "install it with: pip install 'trl>=1.16,<2' (or measure this side alone with --ours-only)"
GIB = 2**30
NAMES = {"trl": "TRL", "ours": "hybrid_lightning"}
HEADER = ["workload", "TRL s/step", "ours s/step", "TRL/ours (min-max)", "wanted", "reached", "TRL peak GiB", "ours"]
HEADER += ["ours/TRL", "wanted", "reached", "mean tokens TRL", "ours"]


def build_parser() -> argparse.ArgumentParser:
    where = {"device": "cpu", "threads": CORES, "seed": 0, "model": SMOLLM2, "out": Path("runs/vs_trl")}
    parser = command("speed.vs_trl", __doc__, pairs=5, workload=list(WORKLOADS), **where)
    parser.add_argument("--trl", action="append", default=[], metavar="NAME=VALUE", help="of GRPOConfig, such as bf16=false")
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--ours-only", action="store_true", help="without TRL, for profiling")
    alone.add_argument("--trl-only", action="store_true", help="without ours, to try TRL's settings")
    return parser


def check(arguments: argparse.Namespace) -> None:
    check_at_least(arguments, 1, "pairs", "threads")
    overrides(arguments.trl)
    if not arguments.ours_only:
        if find_spec("trl") is None:
            raise UsageError(f"TRL is not installed; {NEEDS_TRL}")
        release = tuple(int(number) for number in re.findall(r"\d+", version("trl"))[:2])
        if not (1, 16) <= release < (2, 0):
            raise UsageError(f"this comparison is written for TRL 1.16 up to 2, found {version('trl')}; {NEEDS_TRL}")
    models = [workload.model for workload in chosen_workloads(arguments)]
    check_can_run(models, "give another --model, or run --workload tiny, which needs no model", arguments.device)


def overrides(pairs: list[str]) -> dict[str, Any]:
    """`["bf16=false"]` as `{"bf16": False}`; a value that is not JSON is text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--trl needs NAME=VALUE, such as --trl gradient_checkpointing=true, got {pair!r}")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
    return values


def chosen_workloads(arguments: argparse.Namespace) -> list[Workload]:
    """The workloads, with the requested model; tiny keeps its own."""
    workloads = [WORKLOADS[name] for name in dict.fromkeys(arguments.workload)]
    return [replace(load, model=arguments.model) if load.model == SMOLLM2 else load for load in workloads]


def run(arguments: argparse.Namespace) -> None:
    """Measure all workloads. Each finished workload is written immediately."""
    check(arguments)
    sides = ("ours",) if arguments.ours_only else ("trl",) if arguments.trl_only else ("trl", "ours")
    out, plan = arguments.out, Plan.of(arguments, sides, overrides=overrides(arguments.trl))
    workloads = chosen_workloads(arguments)
    results: dict[str, dict[str, Any]] = {}
    with prepared(workloads, plan) as folders:
        for workload, folder in zip(workloads, folders, strict=True):
            results[workload.name] = summarize(workload, compare(workload, folder, plan), plan.device)
            content = {**about(arguments), "trl_overrides": plan.overrides, "workloads": results}
            (out / "vs_trl.json").write_text(json.dumps(content, indent=1))
    print(table(HEADER, [row(name, result) for name, result in results.items()]))
    draw(results, f"One step, {plan.device}, {plan.threads} threads", out / "vs_trl.png")
    print(f"\nWritten: {out / 'vs_trl.json'}, {out / 'vs_trl.png'}")


def summarize(workload: Workload, measured: dict[str, Any], device: str) -> dict[str, Any]:
    """Everything about one workload: its settings, all steps, and the numbers of the table."""
    sides = {side: summarize_side(steps, device) for side, steps in measured["steps"].items()}
    for side, numbers in sides.items():
        numbers["above_loaded_model"] = numbers["peak_bytes"] - measured["facts"][side]["memory"][device]
    result: dict[str, Any] = {"settings": asdict(workload), **measured, "summary": sides}
    if len(sides) == 2:
        pairs = zip(measured["steps"]["trl"][1:], measured["steps"]["ours"][1:], strict=True)
        result["ratio"] = spread([trl["seconds"] / ours["seconds"] for trl, ours in pairs])
        result["memory_ratio"] = sides["ours"]["peak_bytes"] / sides["trl"]["peak_bytes"]
        result["reached"] = {
            "speed": result["ratio"]["median"] >= workload.wanted_speed,
            "memory": result["memory_ratio"] <= workload.wanted_memory,
        }
    return result


def row(name: str, result: dict[str, Any]) -> list[str]:
    """One line of the table; a dash stands for a missing measurement."""
    sides, settings, both = result["summary"], result["settings"], "ratio" in result
    seconds = [f"{sides[side]['seconds']['median']:.2f}" if side in sides else "-" for side in NAMES]
    peaks = [f"{sides[side]['peak_bytes'] / GIB:.2f}" if side in sides else "-" for side in NAMES]
    tokens = [f"{sides[side]['mean_tokens']:.1f}" if side in sides else "-" for side in NAMES]
    speed = memory = ["-"] * 3
    if both:
        speed = [shown(result["ratio"]), f"{settings['wanted_speed']:g}", yes(result["reached"]["speed"])]
        memory = [f"{result['memory_ratio']:.2f}", f"{settings['wanted_memory']:g}", yes(result["reached"]["memory"])]
    return [name, *seconds, *speed, *peaks, *memory, *tokens]


def draw(results: dict[str, dict[str, Any]], title: str, out: Path) -> None:
    """Draw seconds and peak memory of both sides; above the bars, the factor that this project saves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: the process is small while workers are measured
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {"seconds per step": lambda side: side["seconds"]["median"], "peak GiB": lambda side: side["peak_bytes"] / GIB}
    for axes, (name, height) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for place, result in enumerate(results.values()):
            for side, summary in result["summary"].items():
                shift, colour = {"trl": (-0.19, "#d1495b"), "ours": (0.19, "#1f6fb2")}[side]
                axes.bar(place + shift, height(summary), 0.38, color=colour, label=NAMES[side] if place == 0 else None)
            if "ratio" in result:
                times = result["ratio"]["median"] if "seconds" in name else 1 / result["memory_ratio"]
                top = max(height(side) for side in result["summary"].values())
                axes.annotate(f"{times:.1f}x", (place, top), ha="center", va="bottom")
        axes.set(title=name, xticks=range(len(results)), xticklabels=list(results))
        axes.margins(y=0.15)
    axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(out, dpi=130)


main = entry(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
