"""Accuracy at equal time and at equal memory, from the curves of the runs and the measured cost of a step.

The clock of the runs themselves tells nothing, since several share the cores; `python -m benchmarks.study.cost` measures alone.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from benchmarks.study.comparison import Comparison, Row
from benchmarks.study.estimates import Estimate, mean
from benchmarks.study.tables import markdown

# Of a trained parameter in float32: itself, its gradient and Adam's two moments.
BYTES_OF_STATE = 16


def seconds_of(results: Path, task: str) -> dict[str, tuple[float, float]]:
    """Seconds of a step and of scoring by method, the median of the rounds; none where nothing was measured."""
    path = results / "cost" / f"{task}.json"
    if not path.exists():
        return {}
    rounds: Mapping[str, Sequence[Mapping[str, float]]] = json.loads(path.read_text(encoding="utf-8"))["rounds"]
    return {
        name: (median(r["seconds_per_step"] for r in measured), median(r["scoring_seconds"] for r in measured))
        for name, measured in rounds.items()
    }


def at_time(row: Row, seconds_per_step: float, scoring: float, budget: float) -> Estimate:
    """Validation accuracy after some seconds, between two validations on the line through both; at most that of the last."""
    steps = max(0.0, (budget - scoring) / seconds_per_step)
    return mean([_at_step(record.curve, steps) for record in row.records])


def _at_step(curve: Sequence[Mapping[str, float]], step: float) -> float:
    before = max((point for point in curve if point["step"] <= step), key=lambda point: point["step"])
    after = min((point for point in curve if point["step"] > step), key=lambda point: point["step"], default=None)
    if after is None:
        return before["avg"]
    share = (step - before["step"]) / (after["step"] - before["step"])
    return before["avg"] + share * (after["avg"] - before["avg"])


def equal_time(results: Path, comparison: Comparison) -> str:
    """Every method that was measured, in the time that LoRA needs for all its steps; empty where LoRA was not measured."""
    seconds = seconds_of(results, comparison.task)
    lora = comparison.rows.get("lora")
    if lora is None or "lora" not in seconds:
        return ""
    budget = seconds["lora"][1] + seconds["lora"][0] * lora.records[0].curve[-1]["step"]
    rows = {name: at_time(row, *seconds[name], budget) for name, row in comparison.rows.items() if name in seconds}
    header = ("method", "ms a step", f"validation accuracy % after {budget:.1f} s")
    ordered = sorted(rows.items(), key=lambda item: -item[1].value)
    return markdown(header, [(name, f"{1e3 * seconds[name][0]:.0f}", value.text()) for name, value in ordered])


def equal_memory(comparison: Comparison) -> str:
    """Every method, and the best one that trains no more than it does."""
    rows = sorted((row for row in comparison.rows.values() if row.trainable), key=lambda row: row.trainable)
    lines = []
    for row in rows:
        best = max((other for other in rows if other.trainable <= row.trainable), key=lambda other: other.accuracy.value)
        state = fmean(record.trainable_parameters for record in row.records) * BYTES_OF_STATE / 2**20
        lines.append((row.method, f"{state:.2f}", row.accuracy.text(), f"{best.method}, {best.accuracy.text()}"))
    return markdown(("method", "state, MiB", "accuracy %", "best with no more state"), lines)
