"""Checks what an environment returns, often the user's own code: roles and texts, a finite reward, whether the episode is over.

Valid answers are copied as plain data, since the environment may change its objects afterwards.
"""

import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

import torch

from hybrid_lightning.environments.environment import CUT_MARK, Step
from hybrid_lightning.errors import one_line, shorten
from hybrid_lightning.types import Message

MAX_CHARS = 1_000_000  # in all messages of an answer; the rest is cut before tokenization
_MESSAGE_CHARS = 1_000  # charged per message besides its text
_LARGEST = torch.finfo(torch.float32).max  # rewards are summed up in float32


class OddAnswerError(Exception):
    """An answer of the wrong form; the text states what was returned and what is required."""


def checked_messages(value: Any) -> tuple[Message, ...]:
    """The return value of `start`, as messages.

    Raises:
        OddAnswerError: If it is something else.
    """
    if value is None:
        return ()
    entries = [value] if isinstance(value, (str, Mapping)) else value
    if not isinstance(entries, Sequence) or isinstance(entries, (bytes, bytearray)):
        raise OddAnswerError(f"returned {shorten(value)}; it must return messages, such as [{_EXAMPLE}]")
    messages: list[Message] = []
    left = MAX_CHARS
    for entry in entries:
        messages.append(_copied(entry, left))
        left -= len(messages[-1]["content"]) + _MESSAGE_CHARS
        if left <= 0:
            break
    return tuple(messages)


def checked_step(value: Any) -> Step:
    """The return value of `step`, as a `Step`.

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
    counts = {str(name): _number(count, f"counts[{name!r}]") for name, count in value.counts.items()}
    return Step(checked_messages(value.messages), _number(value.reward, "reward"), bool(over), value.end, counts)


def checked_reward(value: Any) -> float:
    """The return value of `final_reward`, as a number.

    Raises:
        OddAnswerError: If it is something else.
    """
    return _number(value, "reward")


_EXAMPLE = '{"role": "user", "content": "..."}'


def _copied(entry: Any, most: int) -> Message:
    """A message as plain data; its text is cut to `most` characters and a mark."""
    message = {"role": "user", "content": entry} if isinstance(entry, str) else entry
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise OddAnswerError(f"returned the message {shorten(entry)}; a message has a role and a content, such as {_EXAMPLE}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not role or role == "assistant":
        raise OddAnswerError(f"returned a message with role {shorten(role)}; give a role such as user or tool, not the policy's")
    if not isinstance(content, str):
        raise OddAnswerError(f"returned a message with the content {shorten(content)}; it must be text")
    if len(content) > most:
        content = content[:most] + CUT_MARK
    try:
        text = json.dumps({**message, "content": content}, ensure_ascii=False)
        text.encode()  # invalid characters, such as half a surrogate pair, cannot be tokenized
    except (TypeError, ValueError, RecursionError) as error:
        raise OddAnswerError(
            f"returned a message that cannot be written as JSON ({one_line(error)}); use only texts, numbers, lists and dicts, "
            'and decode bytes with errors="replace"'
        ) from None
    if len(text) > 10 * MAX_CHARS:
        raise OddAnswerError(f"returned a message with {len(text):,} characters beside its content; shorten them")
    return json.loads(text)  # type: ignore[no-any-return]


def _scalar(value: Any) -> Any:
    """A number itself, or the number in a NumPy or torch scalar."""
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
