"""Draws held-out accuracy and training reward of finished runs: `python -m benchmarks.curves OUT.png TITLE RUN_FOLDER ...`.

Reads the TensorBoard events that a run leaves in its folder; runs in folders that differ only by a trailing number are drawn in
one colour.
"""

import re
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.commands import command

COLOURS = ("#1f6fb2", "#d1495b", "#3a8f5c", "#8a5aa8")


def draw(out: Path, title: str, folders: list[Path]) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    held_out, training = figure.subplots(1, 2)
    colours: dict[str, str] = {}
    for folder in folders:
        name = folder.parent.name if folder.name.startswith("version_") else folder.name
        method = re.sub(r"[-_]?\d+$", "", name)
        first = method not in colours
        colour = colours.setdefault(method, COLOURS[len(colours) % len(COLOURS)])
        events = EventAccumulator(str(folder))
        events.Reload()
        logged = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        curves = {tag: ([event.step for event in made], [event.value for event in made]) for tag, made in logged.items()}
        sampled = next(tag for tag in curves if tag.rstrip("0123456789") == "val/avg@")
        for tag, style, label in ((sampled, "-", sampled.removeprefix("val/")), ("val/greedy_accuracy", "--", "greedy")):
            steps, values = curves[tag]
            held_out.plot(steps, [100 * v for v in values], style, color=colour, label=f"{method}, {label}" if first else None)
        training.plot(*curves["reward"], color=colour, alpha=0.7, linewidth=1, label=method if first else None)
    held_out.set(title="held-out accuracy", xlabel="optimizer step", ylabel="%", ylim=(0, 100))
    training.set(title="training reward", xlabel="optimizer step", ylim=(0, None))
    for axes in (held_out, training):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = command("curves", __doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("title")
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    draw(arguments.out, arguments.title, arguments.folders)


if __name__ == "__main__":
    main()
