"""Tables and the figure of `results/oracle.md`."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.oracle.sweep import ADVANTAGES, CORRECTIONS, LAGS, LOSSES, OPTIONS, SIZES, Line, is_nothing
from benchmarks.oracle.world import STEP
from benchmarks.tables import table

Cell = Callable[[Line], str]
HEADER = ("angle", "length", "wrong sign", "noise", "worth")


def angle(line: Line) -> str:
    """Degrees, or - for a mean of 0."""
    return "-" if is_nothing(line) else _round(line.estimate.angle)


def worth(line: Line) -> str:
    """Fresh completions."""
    return "0" if is_nothing(line) else f"{line.worth:.1f}".replace("-0.0", "0.0")


def both(line: Line) -> str:
    """Angle and worth."""
    return "-" if is_nothing(line) else f"{angle(line)} / {worth(line)}"


def columns(line: Line) -> list[str]:
    """All that `HEADER` names."""
    of = line.estimate
    if is_nothing(line):
        return ["-", "0", "-", "-", "0"]
    return [angle(line), f"{of.length:.3g}", f"{100 * of.wrong_sign:.1f}%", f"{of.noise:.2f}", worth(line)]


def _round(value: float) -> str:
    return "0" if value < 1e-5 else f"{value:.1f}" if value >= 0.1 else f"{value:.0e}"


class Lines(list[Line]):
    """Lines that can be looked up by their names."""

    def where(self, **names: object) -> "Lines":
        """Those with these values; unless named, of the first seed, with counted cut completions and steps of the usual size."""
        wanted = {"seed": 0, "size": STEP, "cut": "counted", **names}
        return Lines(line for line in self if all(getattr(line, name) == value for name, value in wanted.items()))

    def one(self, **names: object) -> Line:
        """The first of them."""
        return self.where(**names)[0]


def _grid(lines: Lines, cell: Cell, rows: Sequence[str], columns: Sequence[str], row: str, column: str, **names: object) -> str:
    cells = [[name, *(cell(lines.one(**{row: name, column: other}, **names)) for other in columns)] for name in rows]
    return table([row, *columns], cells)


def _of_advantages(lines: Lines, cell: Cell, policy: str, rewards: str, step: str = "first") -> str:
    names = {"policy": policy, "rewards": rewards, "lag": 0, "step": step, "correction": "none", "samples": 4}
    return _grid(lines, cell, list(LOSSES), ADVANTAGES, "loss", "advantage", **names)


def _of_corrections(lines: Lines, policy: str, lag: int, step: str) -> str:
    names = {"policy": policy, "rewards": "binary", "lag": lag, "step": step, "advantage": "LeaveOneOut"}
    return _grid(lines, both, list(LOSSES), CORRECTIONS, "loss", "correction", **names)


def _seeds(lines: Lines) -> str:
    situations = ((0, "first", "none"), (0, "later", "none"), (4, "first", "none"), (4, "first", "TokenTruncation"))
    seeds = sorted({line.seed for line in lines})
    cells = []
    for loss in LOSSES:
        names = {"policy": "logits", "rewards": "binary", "loss": loss, "advantage": "Group", "samples": 4}
        row = [loss]
        for lag, step, correction in situations:
            found = [lines.one(lag=lag, step=step, correction=correction, seed=seed, **names).estimate.angle for seed in seeds]
            row.append(f"{_round(median(found))} ({_round(min(found))} to {_round(max(found))})")
        cells.append(row)
    return table(["loss", "first step", "later step", "lag 4", "lag 4, TokenTruncation"], cells)


def _sizes(lines: Lines) -> str:
    situations = ((0, "later", "none"), (4, "first", "none"), (4, "first", "TokenTruncation"))
    header = ["loss", *(f"{what}, {size:g}" for what in ("later step", "lag 4", "corrected") for size in SIZES)]
    cells = []
    for loss in LOSSES:
        names = {"policy": "logits", "rewards": "binary", "loss": loss, "advantage": "Group", "samples": 4}
        found = [
            lines.one(lag=lag, step=step, correction=of, size=size, **names) for lag, step, of in situations for size in SIZES
        ]
        cells.append([loss, *map(both, found)])
    return table(header, cells)


def _options(lines: Lines) -> str:
    header = ["loss", *(f"lag {lag}, {step}" for lag in LAGS for step in ("first", "later"))]
    cells = [
        [loss, *(both(lines.one(policy="logits", loss=loss, lag=lag, step=step)) for lag in LAGS for step in ("first", "later"))]
        for loss in OPTIONS
    ]
    return table(header, cells)


def _uncounted(lines: Lines) -> str:
    cases = (("binary", "masked"), ("graded", "masked"), ("failures", "counted"))
    names = {"policy": "logits", "advantage": "LeaveOneOut", "lag": 0, "step": "first", "correction": "none"}
    cells = [
        [loss, *(both(lines.one(loss=loss, rewards=rewards, cut=cut, **names)) for rewards, cut in cases)] for loss in LOSSES
    ]
    return table(["loss", "cut left out, binary", "cut left out, graded", "an episode fails, binary"], cells)


def _wide(lines: Lines) -> str:
    return table(["loss", *HEADER], [[line.loss, *columns(line)] for line in lines.where(policy="wide")])


def _trl(lines: Lines) -> str:
    found = [line for line in lines if line.loss.startswith("TRL ")]
    cells = [[line.loss, line.advantage, f"lag {line.lag}, {line.step}", *columns(line)] for line in found]
    return table(["loss_type", "scale_rewards", "situation", *HEADER], cells, left=3)


def any_lines(lines: Sequence[Line]) -> str:
    """A table of any lines, for the screen."""
    cells = [[line.policy, line.rewards, line.loss, f"lag {line.lag}, {line.step}", *columns(line)] for line in lines]
    return table(["policy", "rewards", "loss", "situation", *HEADER], cells, left=4)


def tables(found: Sequence[Line]) -> dict[str, str]:
    """Name -> table."""
    lines = Lines(found)
    made = {
        "angle": _of_advantages(lines, angle, "logits", "binary"),
        "worth": _of_advantages(lines, worth, "logits", "binary"),
        "graded": _of_advantages(lines, both, "logits", "graded"),
        "transformer": _of_advantages(lines, both, "transformer", "binary"),
        "transformer graded": _of_advantages(lines, both, "transformer", "graded"),
        "later": _of_advantages(lines, both, "logits", "binary", "later"),
        "seeds": _seeds(lines),
        "sizes": _sizes(lines),
        "options": _options(lines),
        "uncounted": _uncounted(lines),
        "wide": _wide(lines),
        "trl": _trl(lines),
    }
    for lag in LAGS[1:]:
        made[f"lag {lag}"] = _of_corrections(lines, "logits", lag, "first")
    made["lag 4 later"] = _of_corrections(lines, "logits", 4, "later")
    made["lag 4 transformer"] = _of_corrections(lines, "transformer", 4, "first")
    return made


def filled(page: str, made: dict[str, str]) -> str:
    """A page with each table between its marks, `<!-- oracle: NAME -->` and `<!-- end -->`."""
    for name, text in made.items():
        marks = re.compile(rf"(<!-- oracle: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = marks.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
    return page


def as_csv(lines: Sequence[Line]) -> str:
    """All lines, four digits of each number."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0].values()), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in line.values().items()})
    return out.getvalue()


def draw(found: Sequence[Line], out: Path) -> None:
    """Angle and worth of losses and advantages without lag, and of corrections over the lag."""
    lines = Lines(found)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    names = {"policy": "logits", "rewards": "graded", "lag": 0, "step": "first", "correction": "none", "samples": 4}
    values = [[lines.one(loss=loss, advantage=of, **names).estimate.angle for of in ADVANTAGES] for loss in LOSSES]
    left.imshow(values, cmap="YlOrRd", vmin=0, vmax=30, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            left.text(x, y, _round(value), ha="center", va="center", fontsize=8)
    left.set_xticks(
        range(len(ADVANTAGES)), ["group mean", "leave one out", "group std", "batch std", "REINF.++", "per reward"], rotation=30
    )
    left.set_yticks(range(len(LOSSES)), list(LOSSES))
    left.set_title("on-policy, graded rewards: angle of bias (degrees)", fontsize=10)
    colours = ("#222222", "#1f6fb2", "#4aa3df", "#d1495b", "#e09f3e")
    for axes, value, title in (
        (middle, lambda line: line.estimate.angle, "sampler some steps old: angle (degrees)"),
        (right, lambda line: line.worth, "the same: worth in fresh completions"),
    ):
        for correction, colour in zip(CORRECTIONS, colours, strict=True):
            of = {
                "policy": "logits",
                "rewards": "binary",
                "loss": "DrGRPO",
                "advantage": "LeaveOneOut",
                "step": "first",
                "samples": 4,
            }
            points = [value(lines.one(lag=lag, correction=correction if lag else "none", **of)) for lag in LAGS]
            axes.plot(LAGS, points, "o-", color=colour, label=correction, markersize=4, linewidth=1.4)
        axes.set(xlabel="steps between sampler and policy", xticks=LAGS)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
    middle.legend(fontsize=7, title="DrGRPO, leave one out", title_fontsize=7)
    right.set_ylim(bottom=min(0.0, right.get_ylim()[0]))
    figure.savefig(out, dpi=110)
