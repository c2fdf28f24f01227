r"""Options of multiple-choice questions, in the layouts that data sets use, and the option that an answer names.

| layout | cell |
|---|---|
| MMLU | `["Paris", "Rome", ...]` |
| ARC on the hub | `{"text": ["Paris", "Rome", ...], "label": ["A", "B", ...]}` |
| ARC in its files | `[{"text": "Paris", "label": "A"}, ...]` |

In a CSV file such a cell is text, either JSON or a Python literal.
"""

import ast
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from hybrid_lightning.data.tables import to_text
from hybrid_lightning.errors import shorten

MAX_OPTIONS = 26  # one per letter


def parse_cell(cell: Any) -> Any:
    """Parse a cell that holds a list or dict as text (JSON or a Python literal); other cells are returned unchanged.

    Example:
        >>> parse_cell('["a", "b"]'), parse_cell("['a', 'b']"), parse_cell("[sic] a")
        (['a', 'b'], ['a', 'b'], '[sic] a')
    """
    if not isinstance(cell, str) or cell.strip()[:1] not in ("[", "{"):
        return cell
    text = cell.strip()
    with suppress(ValueError):
        return json.loads(text)
    with suppress(ValueError, SyntaxError):
        value = ast.literal_eval(text)
        if isinstance(value, (list, dict)) and repr(value) == text:  # numpy writes ['a' 'b'], which Python would read as ['ab']
            return value
    return cell


def options_of(cell: Any) -> tuple[list[str], list[str] | None]:
    """Texts and labels of the options in a cell; the labels are None if the cell has no labels.

    Raises:
        ValueError: If the cell fits none of the layouts above, or does not hold 2 to 26 options that are text or numbers.
    """
    cell = parse_cell(cell)
    labels = None
    if isinstance(cell, dict):
        cell, labels = cell.get("text"), cell.get("label")
    elif isinstance(cell, Sequence) and cell and all(isinstance(option, dict) for option in cell):
        labels = [option.get("label") for option in cell]
        cell, labels = [option.get("text") for option in cell], None if None in labels else labels
    if not isinstance(cell, Sequence) or isinstance(cell, str) or not 2 <= len(cell) <= MAX_OPTIONS:
        raise ValueError(f"must be a list of 2 to {MAX_OPTIONS} options, not {shorten(cell)}")
    if labels is not None and len(labels) != len(cell):
        raise ValueError(f"has {len(cell)} options and {len(labels)} labels")
    for option in cell:
        if not isinstance(option, (str, int, float)):
            raise ValueError(f"must hold texts or numbers, not {shorten(option)}")
    return [to_text(option).strip() for option in cell], None if labels is None else [to_text(label).strip() for label in labels]


def lettered_options(texts: Sequence[str]) -> str:
    r"""Write options one per line with their letters, as `MultipleChoice` reads them.

    Example:
        >>> lettered_options(["Paris", "Rome"])
        'A. Paris\nB. Rome'
    """
    return "\n".join(f"{option_letter(number)}. {text}" for number, text in enumerate(texts))


def letter_of(answer: Any, texts: Sequence[str], labels: Sequence[str] | None) -> str:
    """Letter of the option that an answer names by its label, its letter, its number (from 0) or its text.

    Raises:
        ValueError: If the answer names no option, or could be more than one.
    """
    text = to_text(answer).strip()
    if labels is not None and text in labels:
        return option_letter(labels.index(text))
    found = {number for number in range(len(texts)) if text in (option_letter(number), f"({option_letter(number)})")}
    if text.isdecimal() and int(text) < len(texts):
        found.add(int(text))
    if isinstance(answer, str):  # an answer that the data has as a number is never the text of an option
        found |= {number for number, option in enumerate(texts) if option == text}
    if not found:
        raise ValueError(
            f"is {shorten(answer)}, which is not an option; give a letter up to {option_letter(len(texts) - 1)}, a number from 0 "
            f"to {len(texts) - 1}, or the text of an option"
        )
    if len(found) > 1:
        meant = " or ".join(option_letter(number) for number in sorted(found))
        raise ValueError(f"is {shorten(answer)}, which may be option {meant}; give the letter")
    return option_letter(found.pop())


def option_letter(number: int) -> str:
    """Letter of an option by its number, 0 being A."""
    return chr(ord("A") + number)
