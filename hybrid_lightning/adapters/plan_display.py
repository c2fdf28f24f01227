"""Show a plan as a table and as a heat map.

The table comes in two forms: for the screen (rich), and for loggers (columns and rows). The heat map shows the scores by layer
(across) and kind of module (down), with frames around the fully trained modules. It is drawn without pyplot, so that no global
state changes and no window opens.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from rich.table import Table

from hybrid_lightning.adapters.candidates import Shape
from hybrid_lightning.adapters.plan import AdapterPlan, PlannedModule

_COLUMNS = ("module", "shape", "parameters", "score", "mode")
_MAX_FULL_SHOWN = 30  # limits the table on the screen, for example under full fine-tuning
_STYLES = {"full": "bold", "lora": "", "frozen": "dim"}
COLORMAP = colormaps["YlGnBu"]
FRAME_COLOR = "#e4572e"  # of fully trained modules; stands out against every color of the map
UNSCORED_COLOR = "#e6e6e6"
INK, FAINT_INK = "#222222", "#777777"
LOG_SPAN = 30.0  # ratio of the largest to the smallest positive score above which the colors are logarithmic
VALUES_UP_TO = 64  # up to this many modules each cell also shows its score
OTHER = "other"  # column of modules outside numbered layers


def plan_table(plan: AdapterPlan, others: int | None = None) -> Table:
    """The plan as a table for the screen: modules by descending score, the fully trained ones in bold.

    Args:
        plan: The plan to show.
        others: Show at most 30 of the fully trained modules, and this many of the others; None shows all modules.
    """
    table = Table(title=plan_title(plan), title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in ("shape", "parameters", "score") else "left")
    modules = _by_score(plan)
    if others is not None:
        full = [module.name for module in modules if module.mode == "full"][:_MAX_FULL_SHOWN]
        shown = {*full, *[module.name for module in modules if module.mode != "full"][:others]}
        modules = [module for module in modules if module.name in shown]
    for module in modules:
        table.add_row(*_cells(module), style=_STYLES[module.mode])
    return table


def plan_rows(plan: AdapterPlan) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The plan for loggers: names of the columns, and one row per module by descending score."""
    return _COLUMNS, [_cells(module) for module in _by_score(plan)]


def draw_heatmap(plan: AdapterPlan) -> Figure:
    """Draw the scores of all candidate modules as a heat map.

    Modules outside numbered layers go into a separate column, the last one. Colors are logarithmic where the positive scores span
    more than a factor of 30; scores of 0 and below then have the lightest color.

    Args:
        plan: Plan to draw; cells of modules without a score are grey.

    Returns:
        A figure, ready for `savefig` or TensorBoard's `add_figure`.
    """
    rows, columns, cells = _grid(plan.candidates)
    scores = np.full((len(rows), len(columns)), np.nan)
    for place, module in cells.items():
        scores[place] = np.nan if module.score is None else module.score
    show_values = len(plan.candidates) <= VALUES_UP_TO
    cell = (0.74, 0.42) if show_values else (max(0.17, min(0.5, 11.0 / len(columns))), 0.32)
    width, height = max(cell[0] * len(columns) + 3.4, 7.0), max(cell[1] * len(rows) + 1.9, 3.0)
    figure = Figure(figsize=(min(width, 24.0), min(height, 40.0)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("white")
    norm = _color_norm(scores)
    mesh = axes.pcolormesh(scores, cmap=COLORMAP, norm=norm, edgecolors="white", linewidth=0.8)
    for (row, column), module in cells.items():
        _draw_cell(axes, row, column, module, norm, show_values)
    _label_axes(axes, rows, columns)
    headline, parameters = plan_title(plan).split("; ")
    figure.suptitle(headline, x=0.01, ha="left", fontsize=11, color=INK)
    model = plan.model if len(plan.model) <= 60 else f"...{plan.model[-57:]}"
    axes.set_title(f"{parameters}, {model}", loc="left", fontsize=9, color=FAINT_INK)
    _draw_legend(figure, plan)
    if bool(np.isfinite(scores).any()):
        scorer = "score" if plan.scorer is None else plan.scorer["class_path"].rsplit(".", 1)[-1]
        label = f"{scorer} (log scale)" if isinstance(norm, LogNorm) else scorer
        figure.colorbar(mesh, ax=axes, label=label, pad=0.015, aspect=22).outline.set_visible(False)  # type: ignore[operator]
    return figure


def plan_title(plan: AdapterPlan) -> str:
    """One line: how many modules are fully trained, have LoRA or are frozen, and the number of trainable parameters."""
    full, lora = len(plan.full_modules), len(plan.lora_modules)
    frozen = len(plan.candidates) - full - lora
    parts = [f"{full} fully trained", f"{lora} with {_lora_name(plan)}"]
    if frozen:
        parts.append(f"{frozen} frozen")
    return f"Adapter plan: {', '.join(parts)}; {plan.trainable_parameters():,} trainable parameters"


def _lora_name(plan: AdapterPlan) -> str:
    if len(plan.ranks) < 2:
        return f"LoRA of rank {(*plan.ranks, plan.lora.rank)[0]}"
    return f"LoRA of ranks {plan.ranks[0]} to {plan.ranks[-1]}"


def _by_score(plan: AdapterPlan) -> list[PlannedModule]:
    # Modules without a score come last; the sort is stable, so equal scores keep the model's order.
    return sorted(plan.candidates, key=lambda m: (m.score is None, -(m.score or 0.0)))


def _cells(module: PlannedModule) -> tuple[str, ...]:
    score = "-" if module.score is None else f"{module.score:.4g}"
    mode = module.mode if module.rank is None else f"{module.mode}, rank {module.rank}"
    return (module.name, _shape_words(module.shape), f"{module.parameters:,}", score, mode)


def _shape_words(shape: Shape) -> str:
    first = next(iter(shape.values())) if isinstance(shape, Mapping) else shape
    return f"{first[0]} x {first[1]}" if len(first) == 2 else f"{first[0]} experts"


def _grid(modules: Sequence[PlannedModule]) -> tuple[list[str], list[str], dict[tuple[int, int], PlannedModule]]:
    """Rows of a heat map (kinds of modules, top to bottom), columns (layers, then `OTHER`), and the module of each cell."""
    matches = [re.match(r"(.*?)\.(\d+)\.(.+)$", module.name) for module in modules]  # stack of layers, layer, kind
    stacks = {match[1] for match in matches if match}
    layers = sorted({int(match[2]) for match in matches if match})
    columns = [*map(str, layers), *([OTHER] if None in matches else [])]
    rows: dict[str, int] = {}
    cells = {}
    for module, match in zip(modules, matches, strict=True):
        kind = match[3] if match else module.name
        if match and len(stacks) > 1:  # such as an encoder's and a decoder's
            kind = f"{match[1]}: {kind}"
        cells[rows.setdefault(kind, len(rows)), columns.index(str(int(match[2])) if match else OTHER)] = module
    return list(rows), columns, cells


def _color_norm(scores: NDArray[np.float64]) -> Normalize:
    known = scores[np.isfinite(scores)]
    positive = known[known > 0]
    if len(positive) and positive.max() > LOG_SPAN * positive.min():
        return LogNorm(positive.min(), positive.max(), clip=True)
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    return Normalize(low, high if high > low else low + 1.0)


def _draw_cell(axes: Axes, row: int, column: int, module: PlannedModule, norm: Normalize, show_value: bool) -> None:
    if module.score is None:
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=UNSCORED_COLOR, edgecolor="white", linewidth=0.8))
    if module.mode == "frozen":
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, hatch="////", edgecolor=FAINT_INK, linewidth=0))
    if module.mode == "full":
        # Inside the cell, so that the frames of neighbours do not touch.
        place = (column + 0.06, row + 0.06)
        axes.add_patch(Rectangle(place, 0.88, 0.88, fill=False, edgecolor=FRAME_COLOR, linewidth=2.4))
    if show_value and module.score is not None:
        dark = module.score > 0 and float(norm(max(module.score, float(norm.vmin or 0.0)))) > 0.55
        x, y, color = column + 0.5, row + 0.5, "white" if dark else INK
        axes.text(x, y, _short_number(module.score), ha="center", va="center", fontsize=7.5, color=color)


def _short_number(score: float) -> str:
    """Write a score in at most seven characters."""
    if score == 0 or 0.01 <= abs(score) < 1000:
        return f"{score:.3g}"
    mantissa, exponent = f"{score:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _label_axes(axes: Axes, rows: list[str], columns: list[str]) -> None:
    axes.invert_yaxis()
    axes.set_yticks([row + 0.5 for row in range(len(rows))], rows, fontsize=9)
    every = max(1, round(len(columns) / 40))
    shown = [column for column, name in enumerate(columns) if column % every == 0 or name == OTHER]
    axes.set_xticks([column + 0.5 for column in shown], [columns[column] for column in shown], fontsize=9)
    axes.set_xlabel("layer")
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_legend(figure: Figure, plan: AdapterPlan) -> None:
    handles = [Patch(facecolor="none", edgecolor=FRAME_COLOR, linewidth=2.4, label="fully trained")]
    unscored = all(module.score is None for module in plan.candidates)
    if plan.lora_modules:
        color = UNSCORED_COLOR if unscored else COLORMAP(0.35)
        handles.append(Patch(facecolor=color, label=_lora_name(plan)))
    if any(module.mode == "frozen" for module in plan.candidates):
        handles.append(Patch(facecolor="white", edgecolor=FAINT_INK, hatch="////", linewidth=0, label="frozen"))
    if any(module.score is None for module in plan.candidates) and not unscored:
        handles.append(Patch(facecolor=UNSCORED_COLOR, label="not scored"))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=9)
