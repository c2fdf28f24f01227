"""Tables in Markdown, for the screen and for pages."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any


def table(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table; all columns except the first `left` are numbers."""
    marks = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, marks, *lines])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def shown(values: dict[str, float], digits: int = 2) -> str:
    """A spread such as 1.20 (1.10-1.30)."""
    return f"{values['median']:,.{digits}f} ({values['min']:,.{digits}f}-{values['max']:,.{digits}f})"


def yes(value: bool) -> str:
    """Whether a goal is reached."""
    return "yes" if value else "NO"


def summarize_side(steps: Sequence[dict[str, Any]], device: str) -> dict[str, Any]:
    """Seconds, peak bytes and mean completion length of one side; the first step, the warm-up, counts only for the peak."""
    measured = steps[1:]
    return {
        "seconds": spread([step["seconds"] for step in measured]),
        "processor_seconds": median(step["processor_seconds"] for step in measured),
        "peak_bytes": max(step["memory"][f"{'cuda' if device == 'cuda' else 'cpu'}_peak"] for step in steps),
        "mean_tokens": sum(step["tokens"] / step["rows"] for step in measured) / len(measured),
    }
