"""The figure of the growth of step time: a panel for each size."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOUR = "#1f6fb2"


def draw(results: dict[str, dict[str, Any]], title: str, out: Path) -> None:
    """Write the figure as PNG; every measured step is a dot."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    (panels,) = figure.subplots(1, len(results), squeeze=False)
    for axes, result in zip(panels, results.values(), strict=True):
        for x, steps in zip(result["x"], result["steps"], strict=True):
            seconds = [step["seconds"] for step in steps[1:]]
            axes.plot([x] * len(seconds), seconds, "o", color="black", markersize=2.5)
        if result["linear"]:
            draw_line(axes, result)
        else:
            draw_power(axes, result)
        axes.set(xlabel=result["label"], ylabel="seconds per step")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(out, dpi=130)


def draw_line(axes: Axes, result: dict[str, Any]) -> None:
    """Medians and the straight line through them."""
    fit, ends = result["line"], [0.0, result["x"][-1]]
    axes.plot(result["x"], result["seconds_median"], "o", color=COLOUR, label="median")
    values = [fit["intercept"] + fit["slope"] * x for x in ends]
    axes.plot(ends, values, color=COLOUR, linewidth=1, label=f"line, R² = {fit['r2']:.4f}")
    axes.set_xlim(left=0)
    slowest = max(step["seconds"] for steps in result["steps"] for step in steps[1:])
    axes.set_ylim(0, 1.1 * slowest)


def draw_power(axes: Axes, result: dict[str, Any]) -> None:
    """Medians on logarithmic axes, beside what would grow as the tokens of separate sequences do, and in proportion."""
    x, seconds, naive = result["x"], result["seconds_median"], result["naive_tokens"]
    axes.plot(x, seconds, "o-", color=COLOUR, linewidth=1, label=f"measured, exponent {result['exponent']:.2f}")
    axes.plot(
        x,
        [seconds[0] * tokens / naive[0] for tokens in naive],
        "--",
        color="#d1495b",
        label=f"as tokens of separate sequences, {result['naive_exponent']:.2f}",
    )
    axes.plot(x, [seconds[0] * size / x[0] for size in x], ":", color="grey", label="in proportion, 1.00")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
