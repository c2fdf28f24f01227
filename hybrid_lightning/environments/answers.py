"""Check what an environment answers, which is often the user's own code: roles and texts, a finite reward, whether it is over.

What passes is plain data, copied: the environment may change its objects afterwards.
"""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

import torch

from hybrid_lightning.environments.environment import CUT_MARK, Step
from hybrid_lightning.errors import shorten
from hybrid_lightning.types import Message

MAX_CHARS = 1_000_000  # of all messages of an answer: what is beyond is cut before it is made into tokens
_MESSAGE_CHARS = 1_000  # that a message counts for besides its text
_LARGEST = torch.finfo(torch.float32).max  # rewards are summed up in float32


class OddAnswerError(Exception):
    """An answer that is none; the text says what it is instead, and what it has to be."""


def checked_messages(value: Any) -> tuple[Message, ...]:
    """What `start` returned, as messages.

    Raises:
        OddAnswerError: If it is something else.
    """
    if value is None:
        return ()
    entries = [value] if isinstance(value, (str, Mapping)) else value
    if not isinstance(entries, Sequence) or isinstance(entries, (bytes, bytearray)):
        raise OddAnswerError(f"returned {shorten(value)}; it must return messages, such as {_EXAMPLE}")
    copy = _Copy()
    messages: list[Message] = []
    for entry in entries:
        messages.append(copy.message(entry))
        if copy.left <= 0:
            break
    return tuple(messages)


def checked_step(value: Any) -> Step:
    """What `step` returned, as a `Step`.

    Raises:
        OddAnswerError: If it is something else.
    """
    if isinstance(value, tuple) and len(value) == 3:
        value = Step(*value)
    if not isinstance(value, Step):
        raise OddAnswerError(f"returned {shorten(value)}; it must return a Step, or a tuple of messages, reward and over")
    over = _scalar(value.over)
    if not isinstance(over, int) or over not in (0, 1):
        raise OddAnswerError(f"returned over={shorten(value.over)}; it must be True or False")
    if value.end not in ("over", "answered"):
        raise OddAnswerError(f"returned end={shorten(value.end)}; it must be 'over' or 'answered'")
    if not isinstance(value.counts, Mapping):
        raise OddAnswerError(f"returned counts={shorten(value.counts)}; it must be a dict of numbers")
    counts = {_Copy().text(name): _number(count, f"counts[{name!r}]") for name, count in value.counts.items()}
    return Step(checked_messages(value.messages), _number(value.reward, "reward"), bool(over), value.end, counts)


_EXAMPLE = '[{"role": "user", "content": "..."}]'


class _Copy:
    """Copies data for messages, and cuts what is too long."""

    def __init__(self) -> None:
        self.left = MAX_CHARS

    def message(self, entry: Any) -> Message:
        if isinstance(entry, str):
            entry = {"role": "user", "content": entry}
        if not isinstance(entry, Mapping) or "role" not in entry or "content" not in entry:
            raise OddAnswerError(
                f"returned the message {shorten(entry)}; a message has a role and a content, as {_EXAMPLE[1:-1]}"
            )
        if not isinstance(entry["role"], str) or not entry["role"] or entry["role"] == "assistant":
            raise OddAnswerError(
                f"returned a message of role {shorten(entry['role'])}; give a role such as user or tool, not the policy's"
            )
        if not isinstance(entry["content"], str):
            raise OddAnswerError(f"returned a message with the content {shorten(entry['content'])}; it must be text")
        self.left -= _MESSAGE_CHARS
        role = _Copy().text(entry["role"])  # which is not cut
        return {"role": role, **{_Copy().text(key): self.plain(value) for key, value in entry.items() if key != "role"}}

    def plain(self, value: Any) -> Any:
        """A copy of data as JSON has it."""
        self.left -= 1
        if isinstance(value, str):
            return self.text(value)
        if self.left <= 0:
            raise OddAnswerError(f"returned a message of more than {MAX_CHARS:,} values")
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, Mapping):
            return {_Copy().text(key): self.plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.plain(item) for item in value]
        raise OddAnswerError(f"returned a message with {shorten(value)}; a message is made of texts, numbers, lists and dicts")

    def text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise OddAnswerError(f"returned the key {shorten(value)}; it must be text")
        text = str.__str__(value)  # no subclass
        if len(text) > self.left:
            text = text[: max(0, self.left)] + CUT_MARK
        self.left -= len(text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise OddAnswerError(
                f"returned text with {shorten(text[error.start])} at position {error.start}, which is no character; decode bytes "
                'with errors="replace"'
            ) from None
        return text


def _scalar(value: Any) -> Any:
    """A number itself; that of a NumPy or torch scalar."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _number(value: Any, name: str) -> float:
    number = _scalar(value)
    if not isinstance(number, (Real, Decimal)):
        raise OddAnswerError(f"returned {name}={shorten(value)}; it must be a number")
    try:
        result = float(number)
    except OverflowError:  # an integer too large for a float
        result = math.inf
    if not abs(result) <= _LARGEST:
        raise OddAnswerError(f"returned {name}={shorten(number)}; it must be finite")
    return result
