"""The study's figures."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.study.comparison import Comparison, Row
from benchmarks.study.methods import METHODS

COLOURS = {
    "start": "#222222",
    "full": "#d1495b",
    "lora": "#66a182",
    "baseline": "#3b7f5f",
    "hybrid": "#1f6fb2",
    "control": "#8d8d8d",
    "budget": "#8a5aa8",
}
CURVES = ("fft", "hybrid", "hybrid_own_ratio", "random", "random_own_ratio", "lora")
STYLES = {"random": "--", "random_own_ratio": "--"}
ALONE = ("random", "random_mlp", "fft", "hybrid_own_ratio", "random_own_ratio")  # beside the families, where a task has them
MARKERS = {"random_mlp": "s"}  # of those that would look alike
# What is compared at every size: more rank for all modules, or more modules fully trained.
FAMILIES = {
    "LoRA, by rank": ("lora", ("lora", "lora_matched", "lora_r1", "lora_r4", "lora_r8", "lora_r16")),
    "hybrid, by budget": ("hybrid", ("hybrid", "budget_2", "budget_5", "budget_20", "budget_40")),
}


def draw_accuracies(comparisons: Sequence[Comparison], out: Path) -> None:
    """Every method on every task: mean, its interval, and each seed as a dot."""
    most = max(len(comparison.rows) for comparison in comparisons)
    figure, places = _figure(len(comparisons), 1.2 + 0.22 * most)
    for axes, comparison in zip(places, comparisons, strict=True):
        _accuracies(axes, comparison)
    figure.savefig(out, dpi=130)


def _figure(number: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with a place for each of so many tasks."""
    columns = math.ceil(math.sqrt(number))
    rows = -(-number // columns)
    figure = Figure(figsize=(4.2 * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in places[number:]:
        unused.remove()
    return figure, places[:number]


def _accuracies(axes: Axes, comparison: Comparison) -> None:
    rows = sorted(comparison.rows.values(), key=lambda row: row.accuracy.value)
    for place, row in enumerate(rows):
        colour = COLOURS[row.group]
        value = row.accuracy
        axes.plot([100 * value.low, 100 * value.high], [place, place], color=colour, linewidth=2)
        axes.plot(
            [100 * r.accuracy for r in row.records], [place] * len(row.records), "o", color=colour, markersize=2.5, alpha=0.5
        )
        axes.plot([100 * value.value], [place], "D", color=colour, markersize=5)
    for name in ("lora", "fft"):
        if name in comparison.rows:
            axes.axvline(100 * comparison.rows[name].accuracy.value, color=COLOURS[METHODS[name].group], linewidth=0.8, alpha=0.6)
    axes.set(
        title=comparison.task,
        xlabel="accuracy on test problems, %",
        yticks=range(len(rows)),
        yticklabels=[r.method for r in rows],
    )
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="x", alpha=0.3)


def draw_curves(comparisons: Sequence[Comparison], out: Path) -> None:
    """Held-out accuracy by optimizer step, the mean over seeds."""
    figure, places = _figure(len(comparisons), 3.4)
    for axes, comparison in zip(places, comparisons, strict=True):
        for name in CURVES:
            if name in comparison.rows:
                curves = [record.curve for record in comparison.rows[name].records]
                steps = [point["step"] for point in curves[0]]
                means = [100 * fmean(curve[n]["avg"] for curve in curves) for n in range(len(steps))]
                axes.plot(steps, means, STYLES.get(name, "-"), color=COLOURS[METHODS[name].group], label=name)
        axes.set(title=comparison.task, xlabel="optimizer step", ylabel="accuracy on validation problems, %")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=130)


def draw_sizes(comparisons: Sequence[Comparison], out: Path) -> None:
    """Accuracy by number of trained parameters: LoRA of several ranks, hybrids of several budgets, and methods of one size."""
    figure, places = _figure(len(comparisons), 3.6)
    for axes, comparison in zip(places, comparisons, strict=True):
        for label, (group, names) in FAMILIES.items():
            rows = sorted((comparison.rows[name] for name in names if name in comparison.rows), key=lambda row: row.trainable)
            _sizes(axes, rows, label, COLOURS[group], "o-")
        for name in ALONE:
            if name in comparison.rows:
                _sizes(axes, [comparison.rows[name]], name, COLOURS[METHODS[name].group], MARKERS.get(name, "D"))
        axes.set(title=comparison.task, xlabel="trained parameters", ylabel="accuracy on test problems, %", xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda parameters, _: f"{parameters / 1000:g}k")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=130)


def _sizes(axes: Axes, rows: Sequence[Row], label: str, colour: str, style: str) -> None:
    means = [100 * row.accuracy.value for row in rows]
    errors = [
        [100 * (row.accuracy.value - row.accuracy.low) for row in rows],
        [100 * (row.accuracy.high - row.accuracy.value) for row in rows],
    ]
    axes.errorbar(
        [row.trainable for row in rows], means, errors, fmt=style, color=colour, label=label, markersize=4, elinewidth=1
    )
