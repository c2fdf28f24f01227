r"""Cells of a row: the first column that is there of several spellings, and what a solution puts into `\boxed{}`."""

import re
from typing import Any

from hybrid_lightning.data.values import shorten, to_text

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[^\s{}$]+))")


def cell(columns: dict[str, Any], *names: str) -> str:
    """Text of the first column that is there.

    Raises:
        ValueError: If none is, or its cell is missing, empty or no text or number.
    """
    name = next((name for name in names if name in columns), None)
    if name is None:
        wanted = " or ".join(map(repr, names))
        raise ValueError(f"there is no column {wanted}; the columns are {', '.join(columns) or 'none'}")
    try:
        text = to_text(columns[name]).strip()
    except ValueError as error:
        raise ValueError(f"column {name!r} {error}") from error
    if not text:
        raise ValueError(f"column {name!r} is empty")
    return text


def boxed_cell(columns: dict[str, Any], *names: str) -> str:
    r"""What the last `\boxed{}` of a solution holds, of the first column that is there.

    Raises:
        ValueError: If there is no such column, or no box in it.
    """
    solution = cell(columns, *names)
    answer = last_boxed(solution)
    if not answer:
        raise ValueError(rf"the solution has no \boxed{{}} with an answer: {shorten(solution)}")
    return answer


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{}` holds, braces within it included; None without one that is closed.

    Example:
        >>> last_boxed(r"First \boxed{1}, then $\boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
    """
    for match in reversed(list(_BOX.finditer(text))):
        if match["bare"]:
            return match["bare"].rstrip(".,")
        depth = 1
        for position in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[match.end() : position].strip()
    return None
