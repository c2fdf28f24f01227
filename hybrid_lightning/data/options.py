r"""The options of multiple-choice questions, in the layouts that data sets have, and which of them an answer is.

| layout | cell |
|---|---|
| MMLU | `["Paris", "Rome", ...]` |
| ARC on the hub | `{"text": ["Paris", "Rome", ...], "label": ["A", "B", ...]}` |
| ARC in its files | `[{"text": "Paris", "label": "A"}, ...]` |

A CSV file has such a cell as text, in JSON or as Python writes it.
"""

import ast
import json
from collections.abc import Sequence
from typing import Any

from hybrid_lightning.data.values import shorten, to_text

MOST_OPTIONS = 26  # letters


def structure(cell: Any) -> Any:
    """A list or dict that a cell holds as text, in JSON or as Python writes it; other cells as they are.

    Example:
        >>> structure('["a", "b"]'), structure("['a', 'b']"), structure("[sic] a")
        (['a', 'b'], ['a', 'b'], '[sic] a')
    """
    if not isinstance(cell, str) or cell.strip()[:1] not in ("[", "{"):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        pass
    try:
        value = ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError):
        return cell
    # numpy writes ['a' 'b'], which Python reads as ['ab']
    return value if isinstance(value, (list, dict)) and repr(value) == cell.strip() else cell


def options_of(cell: Any) -> tuple[list[str], list[str] | None]:
    """Texts of the options of a cell, and their labels if it has some.

    Raises:
        ValueError: If it has no layout of the table above, or not 2 to 26 options of text or numbers.
    """
    cell = structure(cell)
    labels = None
    if isinstance(cell, dict):
        cell, labels = cell.get("text"), cell.get("label")
    elif isinstance(cell, Sequence) and cell and all(isinstance(option, dict) for option in cell):
        labels = [option.get("label") for option in cell]
        cell, labels = [option.get("text") for option in cell], None if None in labels else labels
    if not isinstance(cell, Sequence) or isinstance(cell, str) or not 2 <= len(cell) <= MOST_OPTIONS:
        raise ValueError(f"must be a list of 2 to {MOST_OPTIONS} options, not {shorten(cell)}")
    if labels is not None and len(labels) != len(cell):
        raise ValueError(f"has {len(cell)} options and {len(labels)} labels")
    for option in cell:
        if not isinstance(option, (str, int, float)):
            raise ValueError(f"must hold texts or numbers, not {shorten(option)}")
    return [to_text(option).strip() for option in cell], None if labels is None else [to_text(label).strip() for label in labels]


def lettered(texts: Sequence[str]) -> str:
    r"""Options one a line, as `MultipleChoice` has them.

    Example:
        >>> lettered(["Paris", "Rome"])
        'A. Paris\nB. Rome'
    """
    return "\n".join(f"{_letter(number)}. {text}" for number, text in enumerate(texts))


def letter_of(answer: Any, texts: Sequence[str], labels: Sequence[str] | None) -> str:
    """The letter of an answer that is a label, a letter, the number of an option, the first being 0, or its text.

    Raises:
        ValueError: If it is none of them, or may be more than one option.
    """
    text = to_text(answer).strip()
    if labels is not None and text in labels:
        return _letter(labels.index(text))
    found = {number for number in range(len(texts)) if text in (_letter(number), f"({_letter(number)})")}
    if text.isdecimal() and int(text) < len(texts):
        found.add(int(text))
    if isinstance(answer, str):  # a number in a file is none of a text
        found |= {number for number, option in enumerate(texts) if option == text}
    if not found:
        raise ValueError(
            f"is {shorten(answer)}, which is no option: give a letter up to {_letter(len(texts) - 1)}, a number from 0 to "
            f"{len(texts) - 1}, or the text of an option"
        )
    if len(found) > 1:
        meant = " or ".join(_letter(number) for number in sorted(found))
        raise ValueError(f"is {shorten(answer)}, which may be option {meant}: give the letter")
    return _letter(found.pop())


def _letter(number: int) -> str:
    return chr(ord("A") + number)
