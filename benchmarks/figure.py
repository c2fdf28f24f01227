"""The figure of the comparison: seconds per step and peak memory of both sides, every measured step as a dot."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {"trl": "#d1495b", "ours": "#1f6fb2"}
NAMES = {"trl": "TRL", "ours": "hybrid_lightning"}
WIDTH = 0.38
GIB = 2**30


def draw(results: dict[str, dict[str, Any]], title: str, out: Path) -> None:
    """Write the figure as PNG; the numbers above the bars say how many times less ours takes."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    time, memory = figure.subplots(1, 2)
    for place, result in enumerate(results.values()):
        tops = {"time": 0.0, "memory": 0.0}
        for side, summary in result["summary"].items():
            x = place + (-WIDTH / 2 if side == "trl" else WIDTH / 2)
            label = NAMES[side] if place == 0 else None
            steps = [step["seconds"] for step in result["steps"][side][1:]]
            time.bar(x, summary["seconds_median"], WIDTH, color=COLOURS[side], label=label)
            time.plot([x] * len(steps), steps, "o", color="black", markersize=2.5)
            memory.bar(x, summary["peak_bytes"] / GIB, WIDTH, color=COLOURS[side], label=label)
            tops = {"time": max(tops["time"], *steps), "memory": max(tops["memory"], summary["peak_bytes"] / GIB)}
        if "ratio" in result:
            annotate(time, place, tops["time"], result["ratio"]["median"])
            annotate(memory, place, tops["memory"], 1 / result["memory_ratio"])
    for axes, name in ((time, "seconds per step"), (memory, "peak memory, GiB")):
        axes.set(title=name, xticks=range(len(results)), xticklabels=list(results))
        axes.margins(y=0.15)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    time.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(out, dpi=130)


def annotate(axes: Axes, place: int, top: float, ratio: float) -> None:
    """Write TRL / ours above the bars of a workload."""
    axes.annotate(f"{ratio:.1f}x", (place, top), (0, 4), textcoords="offset points", ha="center", fontsize=9)
