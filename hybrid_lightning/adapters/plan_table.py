"""A plan as a table: for the screen (rich), for TensorBoard (Markdown) and for other loggers (columns and rows)."""

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from hybrid_lightning.adapters.plan import AdapterPlan, PlannedModule

_COLUMNS = ("module", "shape", "parameters", "score", "mode")
_MOST_FULL = 30  # of full fine-tuning, nobody wants to see every module on the screen
_STYLES = {"full": "bold", "lora": "", "frozen": "dim"}


def rich_table(plan: "AdapterPlan", others: int | None = None) -> Table:
    """Modules by descending score, the fully trained ones in bold.

    Args:
        plan: Of which.
        others: How many are shown beside the fully trained ones, and no more than 30 of these; None shows all.
    """
    table = Table(title=title(plan), title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in ("shape", "parameters", "score") else "left")
    modules = _by_score(plan)
    if others is not None:
        full = [module.name for module in modules if module.mode == "full"][:_MOST_FULL]
        shown = {*full, *[module.name for module in modules if module.mode != "full"][:others]}
        modules = [module for module in modules if module.name in shown]
    for module in modules:
        table.add_row(*_cells(module), style=_STYLES[module.mode])
    return table


def rows(plan: "AdapterPlan") -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The names of the columns, and all modules by descending score."""
    return _COLUMNS, [_cells(module) for module in _by_score(plan)]


def markdown(plan: "AdapterPlan") -> str:
    """All modules by descending score, the fully trained ones in bold."""
    lines: list[tuple[str, ...]] = [_COLUMNS, ("---", "---:", "---:", "---:", "---")]
    for module in _by_score(plan):
        name, *rest, mode = _cells(module)
        mark = "**" if mode == "full" else ""
        lines.append((f"{mark}{name}{mark}", *rest, f"{mark}{mode}{mark}"))
    return f"{title(plan)}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n"


def title(plan: "AdapterPlan") -> str:
    """One line: how many modules are trained how, and at what cost."""
    full, lora = len(plan.full_modules), len(plan.lora_modules)
    frozen = len(plan.candidates) - full - lora
    parts = [f"{full} fully trained", f"{lora} with LoRA of rank {plan.lora.rank}"]
    if frozen:
        parts.append(f"{frozen} frozen")
    return f"Adapter plan: {', '.join(parts)}; {plan.trainable_parameters():,} trainable parameters"


def _by_score(plan: "AdapterPlan") -> list["PlannedModule"]:
    # unscored modules last; the sort is stable and keeps the model's order among equals
    return sorted(plan.candidates, key=lambda m: (m.score is None, -(m.score or 0.0)))


def _cells(module: "PlannedModule") -> tuple[str, ...]:
    outputs, inputs = module.shape
    score = "-" if module.score is None else f"{module.score:.4g}"
    return (module.name, f"{outputs} x {inputs}", f"{module.parameters:,}", score, module.mode)
