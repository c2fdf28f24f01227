"""Compares a training step of LoRA, hybrid and full fine-tuning, all in this project: `python -m benchmarks.speed.methods`.

Prints tables, and writes all measurements as JSON. benchmarks/README.md explains the numbers.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.commands import CORES, about, check_at_least, check_can_run, command, entry, tell
from benchmarks.pairs import Plan, compare, prepared
from benchmarks.tables import shown, spread, summarize_side, table, yes
from benchmarks.workloads import SMOLLM2, WORKLOADS, Workload

MAIN = WORKLOADS["main"]
SAME = ("prompt_digest", "threads", "device", "base_bytes")
METHODS = {"lora": "LoRA", "hybrid": "hybrid 10%", "fft": "FFT"}
PARTS = ("extra_weights", "gradients", "optimizer")  # of the trainable state
MIB, GIB = 2**20, 2**30
GOALS = {  # name -> (description, largest ratio wanted)
    "time": ("time of a step, hybrid / LoRA", 1.15),
    "state": ("trainable state, hybrid / FFT", 0.25),
    "peak": ("peak memory, hybrid / FFT", 0.65),
    "scoring": ("scoring once / one hybrid step", 2.0),
}
HEADER = ["method", "s/step", "/ LoRA (min-max)", "trained M", *(f"{part.replace('_', ' ')} MiB" for part in PARTS)]
HEADER += ["state MiB", "/ FFT", "peak GiB", "/ FFT"]


def build_parser() -> argparse.ArgumentParser:
    where = {"device": "cpu", "threads": CORES, "seed": 0, "model": SMOLLM2, "out": Path("runs/methods")}
    parser = command("speed.methods", __doc__, rounds=5, **where)
    for name in ("prompts", "samples", "prompt-tokens", "max-new-tokens"):
        size = getattr(MAIN, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=size, help="of a rollout (default: %(default)s)")
    return parser


def chosen_workload(arguments: argparse.Namespace) -> Workload:
    """The main workload, with the requested sizes and model; all completions have the full length."""
    names = ("model", "prompts", "samples", "prompt_tokens", "max_new_tokens")
    sizes = {name: getattr(arguments, name) for name in names}
    return replace(MAIN, name="methods", mean_tokens=arguments.max_new_tokens, **sizes)


def run(arguments: argparse.Namespace) -> None:
    check_at_least(arguments, 1, "rounds", "threads", "prompts", "prompt-tokens", "max-new-tokens")
    check_at_least(arguments, 2, "samples")  # or no completion would differ from the mean of its group
    check_can_run([arguments.model], "give another --model, as embedded", arguments.device)
    plan = Plan.of(arguments, tuple(METHODS), "benchmarks.speed.run_methods", same=SAME)
    workload = chosen_workload(arguments)
    with prepared([workload], plan) as (folder,):
        tell("loading the model three times, and scoring for hybrid")
        result = summarize(workload, compare(workload, folder, plan), plan.device)
    (path := arguments.out / "methods.json").write_text(json.dumps({**about(arguments), **result}, indent=1))
    print(tables(result))
    print(f"\nWritten: {path}")


def summarize(workload: Workload, measured: dict[str, Any], device: str) -> dict[str, Any]:
    """Everything about the comparison: its settings, all steps, the numbers of the tables."""
    facts, steps = measured["facts"], measured["steps"]
    methods = {name: summarize_method(steps[name], facts[name], device) for name in METHODS}
    for name, method in methods.items():
        rounds = zip(steps[name][1:], steps["lora"][1:], strict=True)
        method["time_over_lora"] = spread([step["seconds"] / other["seconds"] for step, other in rounds])
        method["state_over_fft"] = method["state_total_bytes"] / methods["fft"]["state_total_bytes"]
        method["peak_over_fft"] = method["peak_used_bytes"] / methods["fft"]["peak_used_bytes"]
    hybrid = methods["hybrid"]
    found = {
        "time": hybrid["time_over_lora"]["median"],
        "state": hybrid["state_over_fft"],
        "peak": hybrid["peak_over_fft"],
        "scoring": hybrid["scoring_seconds"] / hybrid["seconds"]["median"],
    }
    goals = {
        name: {"what": what, "measured": found[name], "at_most": limit, "reached": found[name] <= limit}
        for name, (what, limit) in GOALS.items()
    }
    return {"settings": asdict(workload), **measured, "summary": methods, "goals": goals}


def summarize_method(steps: list[dict[str, Any]], facts: dict[str, Any], device: str) -> dict[str, Any]:
    """Numbers of one method; the trainable state is measured after the last step."""
    side, state = summarize_side(steps, device), steps[-1]["state_bytes"]
    # On the CPU the weights are the file itself, mapped, and stay resident as a whole. The float32 weights of full fine-tuning
    # replace the file's, so it is not charged with the file, which it no longer uses.
    replaced = facts["trained_weight_bytes"] - state["extra_weights"] if device == "cpu" else 0
    return {
        **side,
        "peak_used_bytes": side["peak_bytes"] - replaced,
        "state_bytes": state,
        "state_total_bytes": sum(state[part] for part in PARTS),
        "scoring_seconds": facts["scoring_seconds"],
    }


def tables(result: dict[str, Any]) -> str:
    """Tables with the cost of the methods, the goals that are reached, and the cost of scoring."""
    goals = result["goals"].values()
    reached = [[goal["what"], f"{goal['measured']:.2f}", f"{goal['at_most']:g}", yes(goal["reached"])] for goal in goals]
    facts = result["facts"]["hybrid"]
    calibration = facts["calibration"]
    scoring = (
        f"Scoring {facts['modules']} modules on {calibration['sequences']} completions of {calibration['prompts']} prompts took "
        f"{facts['scoring_seconds']:.2f} s; {facts['full_modules']} are fully trained."
    )
    rows = table(HEADER, [row(name, result) for name in METHODS])
    return f"{rows}\n\n{table(['goal', 'measured', 'at most', 'reached'], reached)}\n\n{scoring}"


def row(name: str, result: dict[str, Any]) -> list[str]:
    method, trained = result["summary"][name], result["facts"][name]["trainable_parameters"] / 1e6
    seconds = [f"{method['seconds']['median']:.2f}", shown(method["time_over_lora"])]
    state = [f"{part / MIB:.1f}" for part in (*map(method["state_bytes"].get, PARTS), method["state_total_bytes"])]
    peak = [f"{method['peak_used_bytes'] / GIB:.2f}", f"{method['peak_over_fft']:.2f}"]
    return [METHODS[name], *seconds, f"{trained:.3g}", *state, f"{method['state_over_fft']:.3f}", *peak]


main = entry(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
