"""The study's figures."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.study.comparison import Comparison
from benchmarks.study.methods import METHODS

COLOURS = {
    "full": "#d1495b",
    "lora": "#66a182",
    "baseline": "#3b7f5f",
    "hybrid": "#1f6fb2",
    "control": "#8d8d8d",
    "budget": "#8a5aa8",
}
CURVES = ("fft", "hybrid", "random", "lora")
STYLES = {"random": "--"}


def draw_accuracies(comparisons: Sequence[Comparison], out: Path) -> None:
    """Every method on every task: mean, its interval, and each seed as a dot."""
    most = max(len(comparison.rows) for comparison in comparisons)
    figure = Figure(figsize=(4.2 * len(comparisons), 1.2 + 0.27 * most), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, comparison in zip(figure.subplots(1, len(comparisons), squeeze=False)[0], comparisons, strict=True):
        _accuracies(axes, comparison)
    figure.savefig(out, dpi=130)


def _accuracies(axes: Axes, comparison: Comparison) -> None:
    rows = sorted(comparison.rows.values(), key=lambda row: row.accuracy.value)
    for place, row in enumerate(rows):
        colour = COLOURS[METHODS[row.method].group]
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
    figure = Figure(figsize=(4.2 * len(comparisons), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, comparison in zip(figure.subplots(1, len(comparisons), squeeze=False)[0], comparisons, strict=True):
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
