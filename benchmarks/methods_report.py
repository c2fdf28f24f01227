"""From the steps of the three methods to the tables and the JSON of their comparison."""

from dataclasses import asdict
from itertools import pairwise
from statistics import median
from typing import Any

from commands import columns
from report import GIB, summarize_side, yes
from workloads import Workload

METHODS = {"lora": "LoRA", "hybrid": "hybrid 10%", "fft": "FFT"}
PARTS = ("extra_weights", "gradients", "optimizer")  # of the trainable state
MIB = 2**20
GOALS = {  # name -> (what it is, largest ratio wanted)
    "time": ("time of a step, hybrid / LoRA", 1.15),
    "state": ("trainable state, hybrid / FFT", 0.25),
    "peak": ("peak memory, hybrid / FFT", 0.65),
    "scoring": ("scoring once / one hybrid step", 2.0),
}


def summarize(workload: Workload, measured: dict[str, Any], device: str) -> dict[str, Any]:
    """Everything about the comparison: its settings, all steps, the numbers of the tables."""
    facts, steps = measured["facts"], measured["steps"]
    methods = {name: summarize_method(steps[name], facts[name], device) for name in METHODS}
    for name, method in methods.items():
        method["time_over_lora"] = spread(ratios(steps[name], steps["lora"]))
        method["state_over_fft"] = method["state_total_bytes"] / methods["fft"]["state_total_bytes"]
        method["peak_over_fft"] = method["peak_used_bytes"] / methods["fft"]["peak_used_bytes"]
    hybrid = methods["hybrid"]
    found = {
        "time": hybrid["time_over_lora"]["median"],
        "state": hybrid["state_over_fft"],
        "peak": hybrid["peak_over_fft"],
        "scoring": hybrid["scoring_seconds"] / hybrid["seconds_median"],
    }
    goals = {
        name: {"what": what, "measured": found[name], "at_most": limit, "reached": found[name] <= limit}
        for name, (what, limit) in GOALS.items()
    }
    return {"settings": asdict(workload), **measured, "summary": methods, "goals": goals}


def summarize_method(steps: list[dict[str, Any]], facts: dict[str, Any], device: str) -> dict[str, Any]:
    """Numbers of one method; the trainable state is that after the last step."""
    state = steps[-1]["state_bytes"]
    phases = [step["phase_seconds_since_start"] for step in steps]
    side = summarize_side(steps, facts, device)
    # On the CPU the weights are the file itself, mapped, and stay resident as a whole: full fine-tuning, whose float32 weights
    # take the place of those of the file, is not charged with what it no longer uses.
    replaced = facts["trained_weight_bytes"] - state["extra_weights"] if device == "cpu" else 0
    return {
        **side,
        "peak_used_bytes": side["peak_bytes"] - replaced,
        "phase_seconds_median": {
            name: median(later[name] - earlier[name] for earlier, later in pairwise(phases)) for name in phases[0]
        },
        "state_bytes": state,
        "state_total_bytes": sum(state[part] for part in PARTS),
        "scoring_seconds": sum(facts["scoring_seconds"].values()),
    }


def ratios(steps: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[float]:
    """Seconds of each measured step over those of the other method in the same round; the warm-up does not count."""
    return [step["seconds"] / other["seconds"] for step, other in zip(steps[1:], others[1:], strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def tables(result: dict[str, Any]) -> str:
    """What the methods take, and which goals are reached, as text."""
    header = ["method", "s/step", "/ LoRA (min-max)", "trained M", *(f"{part.replace('_', ' ')} MiB" for part in PARTS)]
    header += ["state MiB", "/ FFT", "peak GiB", "/ FFT"]
    goals = [["goal", "measured", "wanted", "reached"]]
    for goal in result["goals"].values():
        goals.append([goal["what"], f"{goal['measured']:.2f}", f"<= {goal['at_most']:g}", yes(goal["reached"])])
    return "\n".join(
        [
            columns([header, *(row(name, result) for name in METHODS)]),
            "",
            columns(goals),
            "",
            scoring_line(result["facts"]["hybrid"]),
        ]
    )


def row(name: str, result: dict[str, Any]) -> list[str]:
    """One line of the first table."""
    method = result["summary"][name]
    time = method["time_over_lora"]
    return [
        METHODS[name],
        f"{method['seconds_median']:.2f}",
        f"{time['median']:.2f} ({time['min']:.2f}-{time['max']:.2f})",
        f"{result['facts'][name]['trainable_parameters'] / 1e6:.3g}",
        *(f"{method['state_bytes'][part] / MIB:.1f}" for part in PARTS),
        f"{method['state_total_bytes'] / MIB:.1f}",
        f"{method['state_over_fft']:.3f}",
        f"{method['peak_used_bytes'] / GIB:.2f}",
        f"{method['peak_over_fft']:.2f}",
    ]


def scoring_line(facts: dict[str, Any]) -> str:
    """Where the time of scoring went."""
    seconds, calibration = facts["scoring_seconds"], facts["calibration"]
    return (
        f"Scoring {facts['modules']} modules on {calibration['sequences']} completions of {calibration['prompts']} prompts took "
        f"{sum(seconds.values()):.2f} s: rollouts {seconds['calibration_rollouts']:.2f}, gradients "
        f"{seconds['calibration_gradients']:.2f}, spectra and the rest {seconds['scoring']:.2f}; "
        f"{facts['full_modules']} are fully trained."
    )
