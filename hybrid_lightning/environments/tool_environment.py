"""`ToolEnvironment`: tools that a policy may call, until it gives an answer without a call.

A tool is a Python function, or an object of class `Tool` where it keeps something between the calls of an episode.
"""

import inspect
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Self, get_type_hints

from hybrid_lightning.configurable import Configurable
from hybrid_lightning.environments.calls import Call, CallFormat, MalformedCall, choose_format, shows_tools
from hybrid_lightning.environments.environment import CUT_MARK, Environment, Step
from hybrid_lightning.errors import ConfigError, HybridLightningError, one_line, shorten
from hybrid_lightning.stopping import RunStopped
from hybrid_lightning.types import Message, Prompt
from hybrid_lightning.user_calls import TookTooLongError, outcome_within
from hybrid_lightning.user_code import kind_and_text, load_function

_FAILED = ("unparsable", "unknown_tool", "arguments", "raised", "time", "cut")
COUNTS = ("calls", *(f"failed_calls/{kind}" for kind in _FAILED))  # what `Step.counts` holds


class Tool(Configurable, ABC):
    """Base class of tools that keep something between the calls of an episode. A subclass needs only `__call__`.

    The policy is told its docstring, with the arguments in Google's form, and its type hints.

    Example:
        >>> class Notebook(Tool):
        ...     def start(self, seed):
        ...         self.notes = []
        ...     def __call__(self, note: str) -> str:
        ...         '''Write something down.
        ...
        ...         Args:
        ...             note: What to write.
        ...         '''
        ...         self.notes.append(note)
        ...         return f"{len(self.notes)} notes"
        >>> Notebook().name
        'notebook'
    """

    @property
    def name(self) -> str:
        """Name by which the policy calls it; a subclass may set another."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a call of the policy, by text or what can be written as JSON. It may be `async`."""

    def start(self, seed: int) -> None:
        """Begin an episode; the seed is that of `Environment.start`."""

    def close(self) -> None:
        """Free what the episode has used."""

    def new(self) -> Self:
        """An object for one episode, made with the same arguments."""
        return type(self)(**self._init_args)


class ToolEnvironment(Environment):
    """Lets a policy call tools. A message without a call ends the episode: it is the answer, which the reward scores.

    A call that goes wrong gets a message that says why, and is counted: one that cannot be read, an unknown tool, wrong
    arguments, a tool that raises, takes too long or returns too much.

    Args:
        tools: Functions as `package.module.function` or `path/to/file.py:function`, which may be `async`, and objects of class
            `Tool`; in Python functions themselves, too. Arguments need type hints, and a description under `Args:` in the
            docstring.
        call_format: How the policy writes calls; None for the form of its chat template, and without one `PlainCalls`.
        tool_timeout_s: Seconds for each call. All calls of a message have four fifths of `episodes.step_timeout_s`: the policy is
            told which one took too long, and the episode goes on.
        max_result_chars: Characters of what a tool returns; more is cut, with a mark.

    Raises:
        ConfigError: If there is no such function, or it cannot be described to a policy.
    """

    thread_safe: ClassVar[bool] = True

    def __init__(
        self,
        tools: Sequence[str | Tool | Callable[..., Any]],
        call_format: CallFormat | None = None,
        tool_timeout_s: float = 30.0,
        max_result_chars: int = 8_000,
    ) -> None:
        if isinstance(tools, str) or not tools:
            raise ConfigError(f"ToolEnvironment: tools={tools!r}; give a list of functions, such as [my_tools.search]")
        if isinstance(tool_timeout_s, bool) or not 0 < tool_timeout_s < float("inf"):
            raise ConfigError(f"ToolEnvironment: tool_timeout_s={tool_timeout_s!r}; give a positive number of seconds")
        if max_result_chars < 1:
            raise ConfigError(f"ToolEnvironment: max_result_chars={max_result_chars!r}; give at least 1")
        self.tool_timeout_s, self.max_result_chars = tool_timeout_s, max_result_chars
        self._functions: dict[str, Callable[..., Any]] = {}
        self._schemas: dict[str, dict[str, Any]] = {}
        for entry in tools:
            function = load_function(entry, "tools") if isinstance(entry, str) else entry
            function = function.new() if isinstance(function, Tool) else function
            name, schema = describe_tool(function)
            if name in self._functions:
                raise ConfigError(f"ToolEnvironment: two tools are called {name!r}; rename one")
            self._functions[name], self._schemas[name] = function, schema
        self._given_format = call_format
        self.prepare(None)

    def prepare(self, chat_template: str | None) -> None:
        """Choose the form of calls and the role of results by the chat template."""
        super().prepare(chat_template)
        self.call_format = self._given_format or choose_format(chat_template)
        self.call_format.check(list(self._schemas.values()))
        self._shown = chat_template is None or shows_tools(chat_template)
        self._role = "tool" if self._shown else "user"

    def tools(self) -> list[dict[str, Any]]:
        """JSON schemas for the chat template; none if it does not show them, since `start` tells them then."""
        return list(self._schemas.values()) if self._shown else []

    def start(self, prompt: Prompt, seed: int) -> Sequence[Message]:
        """Start the tools, and describe them where the chat template does not."""
        for tool in self._kept():
            tool.start(seed)
        if self._shown or prompt.messages is None:
            return ()
        return [{"role": "system", "content": self.call_format.describe(list(self._schemas.values()))}]

    def step(self, message: Message) -> Step:
        """Call what the policy asks for."""
        counts = dict.fromkeys(COUNTS, 0.0)
        calls = self.call_format.parse(message["content"].rpartition("</think>")[2])
        if not calls:
            return Step((), 0.0, True, "answered", counts)
        until = time.monotonic() + 0.8 * self.step_timeout_s
        return Step([self._answer(call, counts, until) for call in calls], counts=counts)

    def close(self) -> None:
        """Close the tools."""
        for tool in self._kept():
            tool.close()

    def _kept(self) -> list[Tool]:
        return [tool for tool in self._functions.values() if isinstance(tool, Tool)]

    def _answer(self, call: Call | MalformedCall, counts: dict[str, float], until: float) -> Message:
        """The message that a call gets back, by a time of `time.monotonic`."""
        counts["calls"] += 1
        failed, text = self._result(call, until)
        if len(text) > self.max_result_chars:
            failed, text = failed or "cut", text[: self.max_result_chars] + CUT_MARK
        if failed:
            counts[f"failed_calls/{failed}"] += 1
        name = {} if isinstance(call, MalformedCall) else {"name": self._name(call)[:80]}
        # What is no character, such as half of one in JSON, cannot be made into tokens.
        return {
            key: value.encode(errors="replace").decode() for key, value in {"role": self._role, **name, "content": text}.items()
        }

    def _name(self, call: Call) -> str:
        return call.name if call.name is not None else next(iter(self._functions))

    def _result(self, call: Call | MalformedCall, until: float) -> tuple[str, str]:
        """What went wrong, if anything, and the text for the policy."""
        if isinstance(call, MalformedCall):
            return "unparsable", f"error: the call cannot be read: {call.reason}"
        name = self._name(call)
        if name not in self._functions:
            return "unknown_tool", f"error: there is no tool {shorten(name)}; the tools are {', '.join(self._functions)}"
        parameters = self._schemas[name]["function"]["parameters"]
        arguments, wrong = checked_arguments(call, parameters)
        if wrong:
            return "arguments", f"error: {name} {wrong}"
        function = self._functions[name]
        left_s = min(self.tool_timeout_s, until - time.monotonic())
        if left_s <= 0:
            return "time", f"error: {name} was not called, since the calls before it took all the time of the step"
        value, error = outcome_within(lambda: function(**arguments), left_s, as_text)
        if isinstance(error, TookTooLongError):
            return "time", f"error: {name} was not done after {left_s:.3g} s"
        if isinstance(error, (HybridLightningError, RunStopped)):
            raise error
        if error is not None:
            return "raised", f"error: {name} raised {kind_and_text(error)}"
        return "", value


def checked_arguments(call: Call, parameters: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The arguments of a call by their names, and what is wrong with them by the JSON schema of `parameters`, if anything."""
    known = parameters.get("properties", {})
    arguments = dict(call.arguments)
    if call.text is not None and (not arguments or any(name not in known for name in arguments)):
        needed = parameters.get("required") or list(known)[:1]
        if len(needed) > 1:
            return {}, f"takes several arguments; give them as JSON: {_told(known)}"
        arguments = {name: _converted(call.text, known[name]) for name in needed} if needed or call.text else {}
        if call.text and not needed:
            return {}, "takes no arguments"
    unknown = [name for name in arguments if name not in known]
    missing = [name for name in parameters.get("required", ()) if name not in arguments]
    if unknown or missing:
        wrong = f"has no argument {shorten(unknown[0])}" if unknown else f"needs the argument {missing[0]!r}"
        return {}, f"{wrong}; its arguments are {_told(known) or 'none'}"
    for name, value in arguments.items():
        if not _fits(value, known[name]):
            return {}, f"wants the argument {name!r} as {_kind(known[name])}, not {_shown(value)}"
    return arguments, ""


def _told(known: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({_kind(schema)})" for name, schema in known.items())


def _kind(schema: Mapping[str, Any]) -> str:
    """What a JSON schema accepts, in words."""
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value) for value in schema["enum"])
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    kinds += [_kind(option) for option in schema.get("anyOf", ())]
    return " or ".join([*kinds, *(["null"] if schema.get("nullable") else [])]) or "anything"


def _shown(value: Any) -> str:
    """JSON data in a message; lists and objects, which may be long or deep, by their kind alone."""
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else shorten(value)


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether JSON data fits a schema, of those that `get_json_schema` makes."""
    if value is None and schema.get("nullable"):
        return True
    if "enum" in schema:
        return any(type(value) is type(allowed) and value == allowed for allowed in schema["enum"])
    if "anyOf" in schema:
        return any(_fits(value, option) for option in schema["anyOf"])
    if "type" not in schema:
        return True
    kinds = schema["type"]
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(isinstance(value, _TYPES.get(kind, ())) and (kind == "boolean") == isinstance(value, bool) for kind in kinds):
        return False
    if isinstance(value, list):
        first = schema.get("prefixItems")
        if first is not None:
            return len(value) == len(first) and all(map(_fits, value, first))
        return all(_fits(item, schema.get("items", {})) for item in value)
    if isinstance(value, dict):
        return all(_fits(item, schema.get("additionalProperties", {})) for item in value.values())
    return True


def _converted(text: str, schema: Mapping[str, Any]) -> Any:
    """The value that a plain text stands for: itself where the schema accepts a text, otherwise what it is as JSON."""
    if _fits(text, schema):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # which does not fit, and is reported


def as_text(value: Any) -> str:
    """What a tool returned, as text for the policy."""
    if value is None:
        return "(the tool returned nothing)"
    if isinstance(value, (bytes, bytearray)):
        return value.decode(errors="replace")
    if isinstance(value, str):
        return str.__str__(value)
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # no JSON
        return str(value)


def describe_tool(tool: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """The name and the JSON schema of a tool, from its signature and docstring.

    Raises:
        ConfigError: If it lacks a docstring, a type hint or the description of an argument, or takes any number of arguments.
    """
    if isinstance(tool, Tool):
        return tool.name, _schema(type(tool).__call__, tool.name, True)
    name = getattr(tool, "__name__", None)
    if isinstance(tool, type) or not callable(tool) or not isinstance(name, str):
        raise ConfigError(f"ToolEnvironment: the tool {shorten(tool)} is no function; give a function or a hybrid_lightning Tool")
    return name, _schema(getattr(tool, "__func__", tool), name, inspect.ismethod(tool))


@cache
def _schema(function: Callable[..., Any], name: str, bound: bool) -> dict[str, Any]:
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    try:
        parameters = list(inspect.signature(function).parameters.values())[bound:]
        odd = [entry for entry in parameters if entry.kind not in (entry.POSITIONAL_OR_KEYWORD, entry.KEYWORD_ONLY)]
        if odd:
            raise TypeHintParsingException(f"{odd[0]} cannot be given by name")
        hints = get_type_hints(function)

        def described() -> None: ...

        described.__name__, described.__doc__ = name, _SECTION.sub("", inspect.getdoc(function) or "")
        described.__annotations__ = {entry.name: hints[entry.name] for entry in parameters if entry.name in hints}
        described.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        if hints.get("return") in _RETURNED:  # as in TRL's prompts; what else a tool may return has no JSON type
            described.__annotations__["return"] = hints["return"]
        return dict(get_json_schema(described))
    except (DocstringParsingException, TypeHintParsingException, NameError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the tool {name} cannot be described to a policy: {one_line(error)}; write a docstring that says what it does, with "
            "every argument under `Args:`, and give every argument a type hint"
        ) from error


_RETURNED = (str, int, float, bool, list, dict)
# Sections of a docstring that are not for the policy.
_SECTION = re.compile(r"^(?:Examples?|Notes?|Yields|Raises|References):[ \t]*\n(?:[ \t]+.*(?:\n|\Z)|\n)*", re.MULTILINE)
