"""Quantities in several units, such as 1 hour and 30 minutes, as one number: 90 minutes, or 1.5 hours.

For `math_worker.py`, which is no part of the package when it runs: this file imports nothing of ours.
"""

import re
from collections.abc import Callable

GAP = r"[\s~]*(?:\\[ ,;])?[\s~]*"
UNIT = GAP + r"-?(?:\\(?:text|mathrm|mbox)\s*\{)?[\s~]*(?P<unit>[A-Za-z]+)"
FIRST = re.compile(r"(?<![\w.,/^-])(?<!\^\{)(?P<number>\d[\d,]*)" + UNIT)
NEXT = re.compile(
    r"\.?[\s~]*\}?,?" + GAP + r"(?:\\text\s*\{\s*)?(?:and\b|&)?[\s~]*\}?" + GAP + r"(?P<number>\d+(?:\.\d+)?)" + UNIT
)


def in_one_unit(text: str, ratio: Callable[[str, str], float | None]) -> tuple[str, str]:
    r"""A text with each such quantity in the smallest of its units, and in the largest.

    What makes up a whole larger unit, such as the second part of "1 hour, 60 minutes", is an answer of its own and stays.

    Args:
        text: What a completion says, with LaTeX or without.
        ratio: How many of the second unit make one of the first, such as 60 for hours and minutes; None if they do not convert.

    Example:
        >>> in_one_unit("It takes 1 hour, 30 minutes and 36 seconds.", lambda large, small: 60.0)
        ('It takes 5436 seconds.', 'It takes 1.51 hour.')
    """
    small, large, written = "", "", 0
    for first in FIRST.finditer(text):
        if first.start() < written:
            continue
        total, product, last = float(first["number"].replace(",", "")), 1.0, first
        while following := NEXT.match(text, last.end()):
            parts = ratio(last["unit"], following["unit"])
            if parts is None or float(following["number"]) >= parts:
                break
            total, product, last = total * parts + float(following["number"]), product * parts, following
        if last is not first:
            before = text[written : first.start()]
            small += before + _digits(total) + text[last.end("number") : last.end()]
            large += before + _digits(total / product) + text[first.end("number") : first.end()]
            written = last.end()
    return small + text[written:], large + text[written:]


def _digits(number: float) -> str:
    return f"{number:.9f}".rstrip("0").rstrip(".")
