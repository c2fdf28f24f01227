"""Quantities in several units, such as 1 hour and 30 minutes, as one number: 90 minutes, or 1.5 hours.

For `math_worker.py`, which is no part of the package when it runs: this file imports nothing of ours but `math_units.py`.
"""

import re

from math_units import SYMBOLS, WORDS, Readings  # type: ignore[import-not-found]

GAP = r"[\s~]*(?:\\[ ,;])?[\s~]*"
UNIT = GAP + r"-?(?:\\(?:text|mathrm|mbox)\s*\{)?[\s~]*(?P<unit>[A-Za-z]+)"
FIRST = re.compile(r"(?<![\w.,/^-])(?<!\^\{)(?P<number>\d[\d,]*)" + UNIT)
NEXT = re.compile(
    r"\.?[\s~]*\}?,?" + GAP + r"(?:\\text\s*\{\s*)?(?:and\b|&)?[\s~]*\}?" + GAP + r"(?P<number>\d+(?:\.\d+)?)" + UNIT
)


def in_one_unit(text: str) -> tuple[str, str]:
    r"""A text with each such quantity in the smallest of its units, and in the largest.

    What makes up a whole larger unit, such as the second part of "1 hour, 60 minutes", is an answer of its own and stays.

    Example:
        >>> in_one_unit("It takes 1 hour, 30 minutes and 36 seconds.")
        ('It takes 5436 seconds.', 'It takes 1.51 hour.')
    """
    small, large, written = "", "", 0
    for first in FIRST.finditer(text):
        if first.start() < written:
            continue
        total, product, last = float(first["number"].replace(",", "")), 1.0, first
        while following := NEXT.match(text, last.end()):
            ratio = _ratio(last["unit"], following["unit"])
            if ratio is None or float(following["number"]) >= ratio:
                break
            total, product, last = total * ratio + float(following["number"]), product * ratio, following
        if last is not first:
            before = text[written : first.start()]
            small += before + _digits(total) + text[last.end("number") : last.end()]
            large += before + _digits(total / product) + text[first.end("number") : first.end()]
            written = last.end()
    return small + text[written:], large + text[written:]


def _ratio(large: str, small: str) -> float | None:
    """How many of one unit make another; None if they have no dimension in common, or more than one number may be meant."""
    one, other = _readings(large), _readings(small)
    ratios = {round(a / b, 9) for kind in one.keys() & other.keys() for a in one[kind] for b in other[kind]}
    return ratio if len(ratios) == 1 and (ratio := ratios.pop()) > 1 and ratio.is_integer() else None


def _readings(name: str) -> Readings:
    return SYMBOLS.get(name) or WORDS.get(name.casefold()) or {}


def _digits(number: float) -> str:
    return f"{number:.9f}".rstrip("0").rstrip(".")
