"""Marks cases of a test as `long`: run by `.ci/run --long` and `pytest -m long`, and guarded in short by the cases that stay."""

from collections.abc import Iterable
from typing import Any

import pytest


def long_but(cases: Iterable[Any], *short: int) -> list[Any]:
    """The cases of a `parametrize`, marked as long except at some places."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*value, marks=() if place in short else pytest.mark.long) for place, value in enumerate(values)]
