"""Accuracy at equal time and at equal memory, from the curves of the runs and what they took.

Time is that of the processor, beside LoRA's run of the same seed and commit: a run has one thread, and such runs are made one
after another, so that what else the machine did has little part in their ratio. Loading, scoring and validation are in it.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, median

from benchmarks.study.comparison import Comparison, Row
from benchmarks.study.estimates import Estimate, mean
from benchmarks.study.tables import markdown

# Of a trained parameter in float32: itself, its gradient and Adam's two moments.
BYTES_OF_STATE = 16


def relative_time(row: Row, lora: Row) -> Estimate | None:
    """Processor time of a run over that of LoRA, the median over the runs made beside LoRA's and the range of them all.

    None where none was made beside LoRA's, or came to its end.
    """
    beside = {(record.seed, record.commit): record.processor_seconds for record in lora.records if not record.diverged}
    ratios = [
        record.processor_seconds / beside[record.seed, record.commit]
        for record in row.records
        if record.processor_seconds and beside.get((record.seed, record.commit)) and not record.diverged
    ]
    return Estimate(median(ratios), min(ratios), max(ratios), len(ratios)) if ratios else None


def at_time(row: Row, share: float) -> Estimate:
    """Validation accuracy after a share of the steps, between two validations on the line through both; at most the last."""
    return mean([_at_step(record.curve, min(1.0, share) * record.curve[-1]["step"]) for record in row.records])


def _at_step(curve: Sequence[Mapping[str, float]], step: float) -> float:
    before = max((point for point in curve if point["step"] <= step), key=lambda point: point["step"])
    after = min((point for point in curve if point["step"] > step), key=lambda point: point["step"], default=None)
    if after is None:
        return before["avg"]
    share = (step - before["step"]) / (after["step"] - before["step"])
    return before["avg"] + share * (after["avg"] - before["avg"])


def equal_time(comparison: Comparison) -> str:
    """Every trained method in the time that LoRA needs for all its steps; empty where no other was run beside LoRA."""
    lora = comparison.rows.get("lora")
    if lora is None:
        return ""
    times = {
        name: time for name, row in comparison.rows.items() if row.trainable and (time := relative_time(row, lora)) is not None
    }
    values = {name: at_time(comparison.rows[name], 1 / time.value) for name, time in times.items()}
    ordered = sorted(values.items(), key=lambda item: -item[1].value)
    lines = [(name, str(times[name].number), times[name].text(1, 2), value.text()) for name, value in ordered]
    header = ("method", "runs beside LoRA's", "time, of LoRA's [all runs]", "validation accuracy % in LoRA's time")
    return markdown(header, lines) if len(lines) > 1 else ""


def equal_memory(comparison: Comparison) -> str:
    """Every method, and the best one that trains no more than it does."""
    rows = sorted((row for row in comparison.rows.values() if row.trainable), key=lambda row: row.trainable)
    lines = []
    for row in rows:
        best = max((other for other in rows if other.trainable <= row.trainable), key=lambda other: other.accuracy.value)
        state = fmean(record.trainable_parameters for record in row.records) * BYTES_OF_STATE / 2**20
        lines.append((row.method, f"{state:.2f}", row.accuracy.text(), f"{best.method}, {best.accuracy.text()}"))
    return markdown(("method", "state, MiB", "accuracy %", "best with no more state"), lines)
