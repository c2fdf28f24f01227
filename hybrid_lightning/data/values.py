"""Cells of a table as text: one way for answers, templates and few-shot examples."""

import math
from decimal import Decimal
from typing import Any

EXACT_FLOAT = 2.0**53  # from here on a float no longer tells neighbouring integers apart


def to_text(value: Any) -> str:
    """Write a cell as text, numbers in one canonical form that loses nothing.

    Args:
        value: Text, a number or a bool.

    Returns:
        Text unchanged; a number without exponent and without a fractional part that is zero.

    Raises:
        ValueError: If the value is missing, not finite, no longer exact, or of another type.

    Example:
        >>> [to_text(value) for value in ("5.0", 5, 5.0, 0.25, 1e-7, True)]
        ['5.0', '5', '5', '0.25', '0.0000001', 'True']
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int)):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"is {value}, which is no number")
        if abs(value) >= EXACT_FLOAT:
            raise ValueError(f"is {value!r}, which a float does not hold exactly: write it as text")
        return _plain(Decimal(repr(value)))
    if isinstance(value, Decimal) and value.is_finite():
        return _plain(value)
    if value is None:
        raise ValueError("is missing")
    raise ValueError(f"is a {type(value).__name__}, not text or a number: {shorten(value)}")


def _plain(number: Decimal) -> str:
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def shorten(value: Any, length: int = 80) -> str:
    """Show a value in an error message: its repr on one line, the middle cut out if it is long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 15]} ... {text[-10:]}"


def one_line(error: BaseException, length: int = 300) -> str:
    """Show another library's exception in an error message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else f"{text[:length]} ..."
