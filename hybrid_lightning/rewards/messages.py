"""Completions, values and exceptions in error messages about rewards: short, and on one line."""

from typing import Any

from hybrid_lightning.types import Prompt


def place(completion: str, prompt: Prompt) -> str:
    """Which completion of which row."""
    return f"for {prompt.source or 'a prompt'} row {prompt.index} with completion {shorten(completion)}"


def describe(error: BaseException) -> str:
    """An exception of somebody else's code."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def shorten(value: Any, length: int = 100) -> str:
    """The repr of a value, cut if it is long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"
