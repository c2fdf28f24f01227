"""Cells of a table as text, in the same way for answers, templates and few-shot examples, and values in error messages."""

import math
from decimal import Decimal
from typing import Any

EXACT_FLOAT = 2.0**53  # from here on, a float cannot represent every integer


def to_text(value: Any) -> str:
    """Write a cell as text; numbers get one canonical form, which loses nothing.

    Args:
        value: Text, number or bool.

    Returns:
        Text unchanged; a number without exponent and without a fractional part of zero.

    Raises:
        ValueError: If the value is missing, not finite, too large for a float to be exact, or of another type.

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
        return _without_exponent(Decimal(repr(value)))
    if isinstance(value, Decimal) and value.is_finite():
        return _without_exponent(value)
    if value is None:
        raise ValueError("is missing")
    raise ValueError(f"is a {type(value).__name__}, not text or a number: {shorten(value)}")


def shorten(value: Any, length: int = 80) -> str:
    """Repr of a value for an error message, with the middle cut out if it is long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 15]} ... {text[-10:]}"


def one_line(error: BaseException, length: int = 300) -> str:
    """Text of another library's exception for an error message, on one line and cut if it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else f"{text[:length]} ..."


def _without_exponent(number: Decimal) -> str:
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text
