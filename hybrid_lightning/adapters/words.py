"""Code of transformers that computes the same is recognised by its words, which its model files repeat."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def words(function: Callable[..., Any]) -> str:
    """The source text of a function or method, without its decorators."""
    return inspect.getsource(inspect.unwrap(function)).partition("def ")[2]
