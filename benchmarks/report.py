"""From the steps of both sides to the table and the JSON of the comparison."""

import os
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median
from typing import Any

from commands import columns
from workloads import Workload

PACKAGES = ("hybrid-lightning", "torch", "lightning", "transformers", "peft", "accelerate", "trl")
GIB = 2**30


def summarize(workload: Workload, measured: dict[str, Any], device: str) -> dict[str, Any]:
    """Everything about one workload: its settings, all steps, and the numbers of the table."""
    sides = {side: summarize_side(measured["steps"][side], measured["facts"][side], device) for side in measured["steps"]}
    result: dict[str, Any] = {"settings": asdict(workload), **measured, "summary": sides}
    if len(sides) == 2:
        pairs = zip(measured["steps"]["trl"][1:], measured["steps"]["ours"][1:], strict=True)
        ratios = [trl["seconds"] / ours["seconds"] for trl, ours in pairs]
        memory = sides["ours"]["peak_bytes"] / sides["trl"]["peak_bytes"]
        result["pairs"] = [{"number": number, "ratio": ratio} for number, ratio in enumerate(ratios, start=1)]
        result["ratio"] = {"median": median(ratios), "min": min(ratios), "max": max(ratios)}
        result["memory_ratio"] = memory
        result["reached"] = {
            "speed": median(ratios) >= workload.wanted_speed,
            "memory": memory <= workload.wanted_memory,
        }
    return result


def summarize_side(steps: list[dict[str, Any]], facts: dict[str, Any], device: str) -> dict[str, Any]:
    """Median seconds, peak bytes and mean completion length; the first step, the warm-up, counts for the peak alone."""
    seconds = [step["seconds"] for step in steps[1:]]
    key = "cuda" if device == "cuda" else "cpu"
    peak = max(step["memory"][f"{key}_peak"] for step in steps)
    lengths = [length for step in steps[1:] for length in step["lengths"]]
    return {
        "seconds_median": median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "processor_seconds_median": median(step["processor_seconds"] for step in steps[1:]),
        "peak_bytes": peak,
        "peak_bytes_above_loaded_model": peak - facts["memory"][key],
        "cpu_peak_bytes": max(step["memory"]["cpu_peak"] for step in steps),
        "mean_completion_tokens": mean(lengths),
        "completion_tokens_range": [min(lengths), max(lengths)],
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The table of the comparison, as text."""
    header = [
        "workload",
        "TRL s/step",
        "ours s/step",
        "TRL/ours (min-max)",
        "wanted",
        "reached",
        "TRL peak GiB",
        "ours peak GiB",
        "ours/TRL",
        "wanted",
        "reached",
        "mean tokens TRL, ours",
    ]
    rows = [header, *(row(name, result) for name, result in results.items())]
    return columns(rows)


def row(name: str, result: dict[str, Any]) -> list[str]:
    """One line of the table; a dash stands for what was not measured."""
    sides, settings = result["summary"], result["settings"]

    def of(side: str, key: str, unit: float = 1, digits: int = 2) -> str:
        return f"{sides[side][key] / unit:.{digits}f}" if side in sides else "-"

    both = "ratio" in result
    ratio = result.get("ratio")
    return [
        name,
        of("trl", "seconds_median"),
        of("ours", "seconds_median"),
        f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "-",
        f">= {settings['wanted_speed']:g}",
        yes(result["reached"]["speed"]) if both else "-",
        of("trl", "peak_bytes", GIB),
        of("ours", "peak_bytes", GIB),
        f"{result['memory_ratio']:.2f}" if both else "-",
        f"<= {settings['wanted_memory']:g}",
        yes(result["reached"]["memory"]) if both else "-",
        f"{of('trl', 'mean_completion_tokens', digits=1)}, {of('ours', 'mean_completion_tokens', digits=1)}",
    ]


def yes(value: bool) -> str:
    """For people."""
    return "yes" if value else "NO"


def machine() -> dict[str, Any]:
    """What the comparison ran on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"platform": platform.platform(), "processor": processor(), "cores": os.cpu_count(), "memory_bytes": memory}


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> dict[str, str | None]:
    """Versions of what is compared, and the commit of this project."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return {**found, "commit": commit()}


def commit() -> str | None:
    """Commit of the working tree that this file is in, with a + if there are changes; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line() -> str:
    """What was typed."""
    return " ".join(["python", *sys.argv])
