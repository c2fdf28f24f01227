"""The figure of the three methods: seconds per step, trainable state and peak memory."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from methods_report import METHODS, MIB, PARTS
from report import GIB

COLOURS = {"lora": "#66a182", "hybrid": "#1f6fb2", "fft": "#d1495b"}
SHADES = (1.0, 0.65, 0.35)  # of the parts of the state


def draw(result: dict[str, Any], title: str, out: Path) -> None:
    """Write the figure as PNG; every measured step is a dot."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    time, state, memory = figure.subplots(1, 3)
    for place, (name, method) in enumerate(result["summary"].items()):
        colour = COLOURS[name]
        steps = [step["seconds"] for step in result["steps"][name][1:]]
        time.bar(place, method["seconds_median"], color=colour)
        time.plot([place] * len(steps), steps, "o", color="black", markersize=2.5)
        time.annotate(f"{method['time_over_lora']['median']:.2f}x", (place, max(steps)), (0, 4), **ABOVE)
        bottom = 0.0
        for part, shade in zip(PARTS, SHADES, strict=True):
            height = method["state_bytes"][part] / MIB
            state.bar(place, height, bottom=bottom, color=colour, alpha=shade)
            if name == "fft":
                state.annotate(part.replace("_", " "), (place, bottom + height / 2), ha="center", va="center", fontsize=8)
            bottom += height
        state.annotate(f"{method['state_over_fft']:.2f}", (place, bottom), (0, 4), **ABOVE)
        memory.bar(place, method["peak_used_bytes"] / GIB, color=colour)
        memory.annotate(f"{method['peak_over_fft']:.2f}", (place, method["peak_used_bytes"] / GIB), (0, 4), **ABOVE)
    scoring = result["summary"]["hybrid"]["scoring_seconds"]
    time.axhline(scoring, color=COLOURS["hybrid"], linestyle=":", linewidth=1)
    time.annotate("scoring, once", (-0.45, scoring), (0, 3), textcoords="offset points", fontsize=8)
    names = ("seconds per step (over LoRA's)", "trainable state, MiB (over FFT's)", "peak memory, GiB (over FFT's)")
    for axes, label in zip((time, state, memory), names, strict=True):
        axes.set(title=label, xticks=range(len(METHODS)), xticklabels=METHODS.values())
        axes.title.set_fontsize(10)
        axes.margins(y=0.15)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(title)
    figure.savefig(out, dpi=130)


ABOVE: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 9}
