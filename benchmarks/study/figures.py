"""The study's figures."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from benchmarks.study.claims import LORA, MLPS
from benchmarks.study.comparison import Comparison, Point, Points, group_of
from benchmarks.study.estimates import Estimate, mean

COLOURS = {"start": "#222222", "full": "#d1495b", "lora": "#66a182", "baseline": "#3b7f5f"}
COLOURS |= {"hybrid": "#1f6fb2", "control": "#8d8d8d", "budget": "#8a5aa8"}
# Of the frontier: label -> methods in the order of their size, colour and style. Some were given up (see methods.py).
LINES = {
    "LoRA": (LORA, "#66a182", "o-"),
    "LoRA on MLPs, attention rank 1": (MLPS[:-1], "#8a5aa8", "s--"),
    "LoRA on MLPs alone": (("mlp_only_r4", "mlp_only_r8"), "#8d8d8d", "v:"),
    "ranks by spectra": (("own_r2", "own_r4", "own_r8", "own_r16"), "#d1495b", "D-"),
    "ranks by spectra within MLPs": (("own_mlp_r4", "own_mlp_r8"), "#e09f3e", "^:"),
    "hybrid 2 to 40%, rank 2 beside": (("budget_2", "budget_5", "hybrid", "budget_20", "budget_40"), "#1f6fb2", "o--"),
    "hybrid 10%, rank 1 to 8 beside": (("hybrid_10_r1", "hybrid", "hybrid_10_r4", "hybrid_10_r8"), "#4aa3df", "x:"),
    "hybrid 10 to 40%, rank 8 beside": (("hybrid_10_r8", "hybrid_20_r8", "hybrid_40_r8"), "#0b3c5d", "P--"),
    "UpdateTail 10%, rank 2 and 8": (("update_tail_10_r2", "update_tail_10_r8"), "#2e7d32", "*-."),
    "rates by width 10%, rank 2 and 8": (("hybrid_by_width", "hybrid_10_r8_by_width"), "#7b5d3b", "p-."),
    "rates by width 10%, MLPs rank 14, attention 1": (("hybrid_10_mlp14_by_width",), "#e76f51", "X:"),
    "dealt over blocks 10%, rank 8": (("spread_10_r8_by_width",), "#00838f", "d:"),
    "random MLPs 10%, rank 2 and 8": (("random_mlp", "random_mlp_10_r8"), "#9e9d24", "<:"),
    "one rate 10%, rank 2 and 8": (("hybrid_one_rate", "hybrid_10_r8_one_rate"), "#c2185b", "h-."),
    "one rate, UpdateTail": (("update_tail_10_r2_one_rate", "update_tail_10_r8_one_rate"), "#1b5e20", "H:"),
    "one rate, random MLPs": (("random_mlp_one_rate", "random_mlp_10_r8_one_rate"), "#6d6d1f", ">:"),
}
PALETTE = 128  # colours of a file, which is a third as large as with all of them


def draw_accuracies(comparisons: Sequence[Comparison], out: Path) -> None:
    """Every method on every task: mean, its interval, and each seed as a dot."""
    columns = math.ceil(math.sqrt(len(comparisons)))
    rows = -(-len(comparisons) // columns)
    height = 1.2 + 0.22 * max(len(comparison.rows) for comparison in comparisons)
    figure = Figure(figsize=(4.2 * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, comparison in zip(places, comparisons, strict=False):
        _accuracies(axes, comparison)
    for unused in places[len(comparisons) :]:
        unused.remove()
    _save(figure, out, dpi=130)


def _accuracies(axes: Axes, comparison: Comparison) -> None:
    rows = sorted(comparison.rows.values(), key=lambda row: row.accuracy.value)
    for place, row in enumerate(rows):
        colour = COLOURS[group_of(row.method)]
        value = row.accuracy
        axes.plot([100 * value.low, 100 * value.high], [place, place], color=colour, linewidth=2)
        dots = [100 * record.accuracy for record in row.records]
        axes.plot(dots, [place] * len(dots), "o", color=colour, markersize=2.5, alpha=0.5)
        axes.plot([100 * value.value], [place], "D", color=colour, markersize=5)
    for name in ("lora", "fft"):
        if name in comparison.rows:
            axes.axvline(100 * comparison.rows[name].accuracy.value, color=COLOURS[group_of(name)], linewidth=0.8, alpha=0.6)
    axes.set(title=comparison.task, xlabel="accuracy on test problems, %")
    axes.set_yticks(range(len(rows)), [row.method for row in rows])
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="x", alpha=0.3)


def draw_frontier(task: str, points: Points, out: Path) -> None:
    """Accuracy by trained parameters, and by peak memory; methods are compared within seeds (see `beside_others`).

    Trials at given rates are left out.
    """
    figure = Figure(figsize=(11.0, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    points = {name: point for name, point in points.items() if "@" not in name}
    estimates = beside_others(points)
    _frontier(left, points, estimates, "trained parameters", lambda point: point.trained)
    _frontier(right, points, estimates, "peak of all tensors in training, MiB", _mebibytes)
    left.set_ylabel("accuracy on test problems, %")
    figure.suptitle(task)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    _save(figure, out, dpi=110)


def _mebibytes(point: Point) -> float:
    return math.nan if point.memory is None else point.memory / 2**20


def _frontier(axes: Axes, points: Points, estimates: Mapping[str, Estimate], label: str, place: Callable[[Point], float]) -> None:
    for name, (family, colour, style) in LINES.items():
        there = sorted((points[method] for method in family if method in points), key=place)
        if not there:
            continue
        values = [estimates[point.method] for point in there]
        errors = [[100 * (v.value - v.low) for v in values], [100 * (v.high - v.value) for v in values]]
        x, y = [place(point) for point in there], [100 * value.value for value in values]
        axes.errorbar(x, y, errors, fmt=style, color=colour, label=name, markersize=5, elinewidth=0.7, linewidth=1.2)
    axes.set(xlabel=label, xscale="log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 4 * low else MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def beside_others(points: Points) -> dict[str, Estimate]:
    """Accuracy of each method, with an interval without the part that all methods share: the quality of a seed's start policy.

    Accuracies are shifted by the difference between the seed's mean over methods and the mean of all seeds (Cousineau, 2005).
    Only methods with all seeds enter these means, so a method with fewer seeds appears as if its seeds were of average
    difficulty. Without such methods, the seeds that all methods have are used.
    """
    seeds = {seed for point in points.values() for seed in point.by_seed}
    complete = [point for point in points.values() if point.by_seed.keys() == seeds]
    if not complete:
        complete, seeds = list(points.values()), set.intersection(*(set(point.by_seed) for point in points.values()))
    if not seeds:  # none that could be compared
        return {name: point.accuracy for name, point in points.items()}
    level = {seed: fmean(point.by_seed[seed] for point in complete) for seed in seeds}
    whole = fmean(level.values())
    moved = {
        name: {seed: value - level[seed] + whole for seed, value in point.by_seed.items() if seed in level}
        for name, point in points.items()
    }
    return {name: mean([values[seed] for seed in sorted(values)]) for name, values in moved.items()}


def _save(figure: Figure, out: Path, dpi: int) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    image = Image.open(drawn).convert("RGB")
    image.quantize(PALETTE, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(out, optimize=True)
