"""`CallFormat`: how a policy writes tool calls. Calls are read from a message in time linear in its length.

The formats are in `json_calls.py` and `tagged_calls.py`, which also finds the format that a chat template teaches.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

from hybrid_lightning.shared.configurable import Configurable

MAX_CALLS = 100  # per message: each JSON error takes time that grows with the text before it
Schema = Mapping[str, Any]  # schema of a tool: {"type": "function", "function": {"name", "description", "parameters"}}


@dataclass(frozen=True)
class Call:
    """A tool call as the policy wrote it: names and types are not checked yet."""

    name: str | None  # None for a form without names, which calls the only tool
    arguments: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None  # replaces `arguments` for a form without argument names


@dataclass(frozen=True)
class MalformedCall:
    """An attempted call that cannot be read."""

    reason: str  # one line, for the policy


class CallFormat(Configurable, ABC):
    """Base class of call formats. A subclass needs `parse` and `describe`."""

    @abstractmethod
    def parse(self, text: str, tools: Sequence[Schema] = ()) -> list[Call | MalformedCall]:
        """Read the calls in a message of the policy.

        Args:
            text: The message with its special tokens, without the token that ended it and without a thought in `<think>`.
            tools: Schemas of the tools, for formats that write values without their types.

        Returns:
            The calls in order; an empty list if there are none. Other text may be around them.
        """

    @abstractmethod
    def describe(self, tools: Sequence[Schema]) -> str:
        """Text that describes the tools and how to call them, for chat templates that do not."""

    def check(self, tools: Sequence[Schema]) -> None:
        """Check that these tools can be called.

        Raises:
            ConfigError: If they cannot be called.
        """


class TemplateFormat(CallFormat):
    """Base of the formats that chat templates teach. A subclass needs `_calls` and `_example`."""

    _example: ClassVar[str]  # a call, for `describe`
    _when: ClassVar[str] = "for each call"

    def parse(self, text: str, tools: Sequence[Schema] = ()) -> list[Call | MalformedCall]:
        """See `CallFormat.parse`. A call that is not closed is malformed; there are at most `MAX_CALLS`."""
        calls = self._calls(text, tools)
        first = list(islice(calls, MAX_CALLS))
        more = next(calls, None) is not None
        return [*first, MalformedCall(f"a message may have {MAX_CALLS} calls; the rest was not read")] if more else first

    def describe(self, tools: Sequence[Schema]) -> str:
        """See `CallFormat.describe`: the schemas of the tools, and how to write a call."""
        schemas = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        how = f"To call a tool, write {self._example} {self._when}."
        return f"You may call these tools, which are described as JSON:\n{schemas}\n{how}"

    @abstractmethod
    def _calls(self, text: str, tools: Sequence[Schema]) -> Iterator[Call | MalformedCall]:
        """All calls in a message, in order."""


def parsed_json(text: str) -> Any:
    """The value of a JSON text; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def typed_value(text: str, schema: Schema) -> Any:
    """The value that a text represents, where a format writes values without their types: the schema decides.

    If the schema accepts only texts, it is the text itself. Otherwise it is the text's value as JSON or a Python constant, if the
    schema accepts that, and else the text. So an optional text is None if it is written as `None` or `null`.

    Example:
        >>> typed_value("3", {"type": "string"}), typed_value("3", {"type": ["string", "integer"]})
        ('3', 3)
        >>> typed_value("True", {"type": "boolean"}), typed_value("None", {"type": "string", "nullable": True})
        (True, None)
    """
    constants = {"True": True, "False": False, "None": None}
    try:
        value = constants[text.strip()] if text.strip() in constants else json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(value, str) and is_valid(value, schema):
        return value
    return text if is_valid(text, schema) else value


def is_valid(value: Any, schema: Schema) -> bool:
    """Whether a schema accepts a value."""
    from jsonschema import Draft202012Validator  # slow to import

    try:
        return bool(Draft202012Validator(without_nullable(schema)).is_valid(value))
    except RecursionError:  # of a value that is too deep
        return False


def without_nullable(schema: Any) -> Any:
    """A schema with OpenAPI's `"nullable": True` rewritten in JSON Schema's form."""
    if isinstance(schema, list):
        return [without_nullable(entry) for entry in schema]
    if not isinstance(schema, Mapping):
        return schema
    plain = {name: without_nullable(entry) for name, entry in schema.items() if not (name == "nullable" and entry is True)}
    if len(plain) < len(schema):
        for name, null in (("type", "null"), ("enum", None), ("anyOf", {"type": "null"})):
            if name in plain:
                plain[name] = [*([plain[name]] if isinstance(plain[name], str) else plain[name]), null]
    return plain


def schemas_of_arguments(parameters: Schema) -> dict[str, Schema]:
    """The schema of each argument of a tool, with the definitions to which it may refer."""
    definitions = {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}
    properties = parameters.get("properties", {})
    return {name: {**definitions, **schema} if isinstance(schema, Mapping) else {} for name, schema in properties.items()}


def typed_arguments(name: str, texts: Mapping[str, str], tools: Sequence[Schema]) -> dict[str, Any]:
    """The arguments of a call, given as texts, converted to the types of the tool's schema."""
    parameters = (tool["function"].get("parameters", {}) for tool in tools if tool["function"]["name"] == name)
    known = schemas_of_arguments(next(parameters, {}))
    return {key: typed_value(text, known[key]) if key in known else text for key, text in texts.items()}
