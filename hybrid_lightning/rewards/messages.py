"""Completions, values and exceptions in error messages about rewards: short, and on one line."""

import sysconfig
import traceback
from pathlib import Path
from typing import Any

from hybrid_lightning.types import Prompt


def place(completion: str, prompt: Prompt) -> str:
    """Which completion of which row."""
    return f"for {prompt.source or 'a prompt'} row {prompt.index} with completion {shorten(completion)}"


def describe(error: BaseException) -> str:
    """An exception of somebody else's code, with the line of that code which led to it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{_line(error)}"


def shorten(value: Any, length: int = 100) -> str:
    """The repr of a value, cut if it is long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


# Code that a message about somebody's reward is not interested in: ours and that of libraries.
_NOT_THEIRS = tuple({str(Path(__file__).parents[1]), *(sysconfig.get_path(name) for name in ("stdlib", "purelib"))})


def _line(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_THEIRS)]
    return f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""
