"""`ToolEnvironment`: tools that a policy may call, until it answers without a call."""

import asyncio
import inspect
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

from hybrid_lightning.environments.calls import Call, CallFormat, MalformedCall
from hybrid_lightning.environments.environment import CUT_MARK, Environment, Step
from hybrid_lightning.environments.foreign import content_text
from hybrid_lightning.environments.mcp_tools import McpTools, ServerLostError
from hybrid_lightning.environments.tagged_calls import choose_format, shows_tools
from hybrid_lightning.environments.tool import Tool, ToolSchema, describe_tool
from hybrid_lightning.errors import ConfigError, DataError, HybridLightningError, shorten
from hybrid_lightning.shared.user_calls import TookTooLongError
from hybrid_lightning.shared.user_calls import call as call_user
from hybrid_lightning.shared.user_code import kind_and_text, load_function
from hybrid_lightning.types import Message, Prompt

_FAILED = ("unparsable", "unknown_tool", "arguments", "raised", "time", "cut")
COUNTS = ("calls", *(f"failed_calls/{kind}" for kind in _FAILED))  # keys of `Step.counts`


class ToolEnvironment(Environment):
    """Lets a policy call tools. A message without a call ends the episode; it is the answer that the reward scores.

    A call fails if it cannot be read, names an unknown tool or has wrong arguments, or if the tool raises, takes too long or
    returns too much. The policy then gets a message with the reason, and the failure is counted.

    The calls in a message are answered in order; successive calls of `async` tools are awaited together, across all episodes.
    Other tools run in threads, concurrently for several episodes. `step` is `async`: a subclass must await it.

    Args:
        tools: Functions as `package.module.function` or `path/to/file.py:function`, which may be `async`; objects of class
            `Tool`; `McpTools` for servers; in Python also functions themselves. Arguments need type hints, and a description
            under `Args:` in the docstring.
        call_format: How the policy writes calls; None for the format of its chat template, or `PlainCalls` if it has none.
        tool_timeout_s: Longest time of each call in seconds; all calls of a message together have four fifths of
            `episodes.step_timeout_s`. After a late call the policy gets a message, and the episode continues.
        max_result_chars: Most characters of a tool's result; the rest is cut, with a mark.
        tools_column: Column with a list of the names of the tools that the row may call; None if every row may call all tools.

    Raises:
        ConfigError: If a function does not exist, or cannot be described to a policy.
        DataError: If a row names a tool that does not exist.
    """

    thread_safe: ClassVar[bool] = True

    def __init__(
        self,
        tools: Sequence[str | Tool | McpTools | Callable[..., Any]],
        call_format: CallFormat | None = None,
        tool_timeout_s: float = 30.0,
        max_result_chars: int = 8_000,
        tools_column: str | None = None,
    ) -> None:
        if isinstance(tools, str) or not tools:
            raise ConfigError(f"ToolEnvironment: tools={tools!r}; give a list of functions, such as [my_tools.search]")
        if isinstance(tool_timeout_s, bool) or not 0 < tool_timeout_s < float("inf"):
            raise ConfigError(f"ToolEnvironment: tool_timeout_s={tool_timeout_s!r}; give a positive number of seconds")
        if max_result_chars < 1:
            raise ConfigError(f"ToolEnvironment: max_result_chars={max_result_chars!r}; give at least 1")
        self.tool_timeout_s, self.max_result_chars, self.tools_column = tool_timeout_s, max_result_chars, tools_column
        self._functions: dict[str, Callable[..., Any]] = {}
        self._schemas: dict[str, ToolSchema] = {}
        for entry in tools:
            if not isinstance(entry, McpTools):
                function = load_function(entry, "tools") if isinstance(entry, str) else entry
                function = function.new() if isinstance(function, Tool) else function
                self._add(function, *describe_tool(function))
        self._servers = [entry for entry in tools if isinstance(entry, McpTools)]  # `prepare` lists their tools
        self._given_format = call_format
        if not self._servers:
            self.prepare(None)

    def _add(self, function: Callable[..., Any], name: str, schema: ToolSchema) -> None:
        if name in self._functions:
            raise ConfigError(f"ToolEnvironment: two tools are named {name!r}; rename one")
        self._functions[name], self._schemas[name] = function, schema

    def prepare(self, chat_template: str | None) -> None:
        """Choose the call format and the role of results by the chat template, and connect to tool servers."""
        super().prepare(chat_template)
        while self._servers:
            for tool in self._servers.pop(0).tools():
                self._add(tool, tool.name, tool.schema)
        self.call_format = self._given_format or choose_format(chat_template)
        self.call_format.check(self._described())
        self._shown = chat_template is None or shows_tools(chat_template)
        self._role = "tool" if self._shown else "user"

    def tools(self) -> list[dict[str, Any]]:
        """JSON schemas for the chat template; none if the template ignores tools, since `start` then describes them."""
        return self._described() if self._shown else []

    def tools_of(self, prompt: Prompt) -> list[dict[str, Any]]:
        """The row's schemas, if rows have their own tools."""
        return [self._schemas[name].schema for name in self._names(prompt)] if self._shown else []

    def _names(self, prompt: Prompt) -> list[str]:
        """Names of the tools that the row may call, in the order of the config."""
        if self.tools_column is None:
            return list(self._functions)
        names, column = prompt.columns.get(self.tools_column), f"{prompt.place}: column {self.tools_column!r}"
        if not isinstance(names, (list, tuple)):
            raise DataError(f"{column} is {shorten(names)}; give a list of tool names, or set tools_column to null")
        for name in names:
            if name not in self._functions:
                raise DataError(f"{column} names {shorten(name)}, which is not a tool; give some of {', '.join(self._functions)}")
        return [name for name in self._functions if name in names]

    def added_roles(self) -> tuple[str, ...]:
        """See `Environment.added_roles`. A subclass with its own `step` may add user messages."""
        return (self._role,) if type(self).step is ToolEnvironment.step else super().added_roles()

    def start(self, prompt: Prompt, seed: int) -> Sequence[Message]:
        """Start the row's tools, and describe them if the chat template does not."""
        names = self._names(prompt)
        self._functions = {name: self._functions[name] for name in names}
        self._schemas = {name: self._schemas[name] for name in names}
        for tool in self._kept():
            tool.start(seed)
        if self._shown or prompt.messages is None or not names:
            return ()
        return [{"role": "system", "content": self.call_format.describe(self._described())}]

    async def step(self, message: Message) -> Step:
        """Run the calls in the policy's message."""
        counts = dict.fromkeys(COUNTS, 0.0)
        text = after_thought(message.get("raw", message["content"]))
        calls = self.call_format.parse(text, self._described()) if self._functions else []
        if not calls:
            return Step((), 0.0, True, "answered", counts)
        until = time.monotonic() + 0.8 * self.step_timeout_s
        answers: list[Message] = []
        for waits, some in groupby(calls, self._is_async):
            answering = [self._answer(call, counts, until) for call in some]
            answers += await asyncio.gather(*answering) if waits else [await answer for answer in answering]
        return Step(answers, counts=counts)

    def close(self) -> None:
        """Close the tools."""
        for tool in self._kept():
            tool.close()

    def _kept(self) -> list[Tool]:
        return [tool for tool in self._functions.values() if isinstance(tool, Tool)]

    def _described(self) -> list[dict[str, Any]]:
        return [schema.schema for schema in self._schemas.values()]

    def _is_async(self, call: Call | MalformedCall) -> bool:
        function = None if isinstance(call, MalformedCall) else self._functions.get(self._name(call))
        return inspect.iscoroutinefunction(function.__call__ if isinstance(function, Tool) else function)

    async def _answer(self, call: Call | MalformedCall, counts: dict[str, float], until: float) -> Message:
        """The message that answers a call, by a deadline of `time.monotonic`."""
        counts["calls"] += 1
        failed, text = await self._result(call, until)
        if len(text) > self.max_result_chars:
            failed, text = failed or "cut", text[: self.max_result_chars] + CUT_MARK
        if failed:
            counts[f"failed_calls/{failed}"] += 1
        name = {} if isinstance(call, MalformedCall) else {"name": self._name(call)[:80]}
        # Invalid characters, such as half a surrogate pair in JSON, cannot be tokenized.
        return {
            key: value.encode(errors="replace").decode() for key, value in {"role": self._role, **name, "content": text}.items()
        }

    def _name(self, call: Call) -> str:
        return call.name if call.name is not None else next(iter(self._functions))

    async def _result(self, call: Call | MalformedCall, until: float) -> tuple[str, str]:
        """The kind of failure, if any, and the text for the policy."""
        if isinstance(call, MalformedCall):
            return "unparsable", f"error: the call cannot be read: {call.reason}"
        name = self._name(call)
        if name not in self._functions:
            return "unknown_tool", f"error: there is no tool {shorten(name)}; the tools are {', '.join(self._functions)}"
        arguments, wrong = self._schemas[name].arguments(call)
        if wrong:
            return "arguments", f"error: {name} {wrong}"
        function = self._functions[name]
        left_s = min(self.tool_timeout_s, until - time.monotonic())
        if left_s <= 0:
            return "time", f"error: {name} was not called, since the calls before it took all the time of the step"
        function = function.__call__ if isinstance(function, Tool) else function
        value, error = await call_user(partial(function, **arguments), left_s, as_text)
        if isinstance(error, TookTooLongError):
            return "time", f"error: {name} was not done after {left_s:.3g} s"
        if isinstance(error, (HybridLightningError, ServerLostError)):
            raise error
        if error is not None:
            return "raised", f"error: {name} raised {kind_and_text(error)}"
        return "", value


def after_thought(text: str) -> str:
    """A message without its leading thought; empty if the thought is not closed, since calls in a thought do not count."""
    begin, opened, rest = text.partition("<think>")
    return rest.partition("</think>")[2] if opened and not begin.strip() else text


def as_text(value: Any) -> str:
    """A tool's result as text for the policy, written like an observation, or with `str` if that is not possible.

    Raises:
        ConfigError: If it contains an image or similar data.
    """
    if value is None:
        return "(the tool returned nothing)"
    if isinstance(value, (bytes, bytearray)):
        return value.decode(errors="replace")
    return content_text(value, fallback=str)
