"""Call formats in JSON or plain text.

HermesCalls    <tool_call>{"name": "search", "arguments": {"query": "..."}}</tool_call>     Qwen 2.5 and 3, Hermes
LlamaCalls     {"name": "search", "parameters": {"query": "..."}}                           Llama 3
DeepSeekCalls  <｜tool▁call▁begin｜>function<｜tool▁sep｜>search, and arguments in JSON      DeepSeek V3
PlainCalls     [search: ...]                                                                for base models
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

from hybrid_lightning.environments.calls import Call, MalformedCall, Schema, TemplateFormat, parsed_json
from hybrid_lightning.errors import ConfigError, shorten
from hybrid_lightning.shared.user_code import compile_pattern

_NAME = r"[A-Za-z_][\w.-]*"
_BRACKET = re.compile(r"[\[\]]")
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"\s*")


class HermesCalls(TemplateFormat):
    """The format in chat templates of Qwen and Hermes: JSON with a name and arguments between tags.

    Example:
        >>> HermesCalls().parse('Let me see. <tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>')
        [Call(name='add', arguments={'x': 1}, text=None)]
    """

    OPEN, CLOSE = "<tool_call>", "</tool_call>"
    _example = f'{OPEN}{{"name": "...", "arguments": {{"...": ...}}}}{CLOSE}'

    def _calls(self, text: str, tools: Sequence[Schema]) -> Iterator[Call | MalformedCall]:
        end = 0
        while (begin := text.find(self.OPEN, end)) >= 0:
            end = begin + len(self.OPEN)
            call, after = _read_json(text, end)
            if isinstance(call, Call):
                end = after
                closed = text.startswith(self.CLOSE, _skip_space(text, end))
                call = call if closed else MalformedCall(f"{self.CLOSE} is missing behind the JSON")
            yield call
        if not end and any(text.endswith(self.OPEN[:length]) for length in range(6, len(self.OPEN))):
            yield MalformedCall(f"it ends within {self.OPEN}")


class LlamaCalls(TemplateFormat):
    """The format in chat templates of Llama 3: a message is JSON with a name and parameters, or several separated by `;`.

    Example:
        >>> LlamaCalls().parse('{"name": "add", "parameters": {"x": 1}}; {"name": "add", "parameters": {"x": 2}}')
        [Call(name='add', arguments={'x': 1}, text=None), Call(name='add', arguments={'x': 2}, text=None)]
    """

    TAG = "<|python_tag|>"
    _example = '{"name": "...", "parameters": {"...": ...}}'
    _when = "and nothing else; put ; between several"

    def _calls(self, text: str, tools: Sequence[Schema]) -> Iterator[Call | MalformedCall]:
        """A message is a call if it begins like one, or if it has the tag."""
        _, tag, after = text.partition(self.TAG)
        text = (after if tag else text).strip()
        if not tag and not re.match(r'\{\s*"(name|parameters|arguments|type)"\s*:', text):
            return
        end = 0
        while end < len(text):
            call, end = _read_json(text, end)
            yield call
            end = _skip_space(text, end)
            if isinstance(call, MalformedCall) or not text.startswith(";", end):
                return
            end = _skip_space(text, end + 1)


class DeepSeekCalls(TemplateFormat):
    """The format of DeepSeek V3: the name, and the arguments as JSON in a block of code, which V3.1 leaves out.

    Example:
        >>> DeepSeekCalls().parse('<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\\n```json\\n{"x": 1}\\n```<｜tool▁call▁end｜>')
        [Call(name='add', arguments={'x': 1}, text=None)]
    """

    OPEN, CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    _example = f'{OPEN}function<｜tool▁sep｜>NAME\n```json\n{{"ARGUMENT": ...}}\n```{CLOSE}'
    _when = "for each call, with <｜tool▁calls▁begin｜> before and <｜tool▁calls▁end｜> after them"
    _form = re.compile(r"(?:\w*<｜tool▁sep｜>)?([^\s<｜]+)(?:<｜tool▁sep｜>|\s*```json)(.*?)(?:```)?", re.DOTALL)

    def _calls(self, text: str, tools: Sequence[Schema]) -> Iterator[Call | MalformedCall]:
        for part in text.split(self.OPEN)[1:]:
            body, closed, _ = part.partition(self.CLOSE)
            form = self._form.fullmatch(body.strip())
            arguments = parsed_json(form[2]) if form else None
            if not closed or form is None:
                yield MalformedCall(f"it is not of the form {self._example}" if closed else f"{self.CLOSE} is missing")
            elif isinstance(arguments, dict):
                yield Call(form[1], arguments)
            else:
                yield MalformedCall(f"the arguments of {form[1][:40]} must be a JSON object, such as {{}}")


class PlainCalls(TemplateFormat):
    r"""A format for base models, such as `[calculator: 12*3]`.

    The name is followed by the only argument of the tool, or by JSON such as {"x": 1, "y": 2}. Brackets must be paired, but not
    in JSON. Text that begins like JSON must be JSON.

    Args:
        pattern: Regular expression for another format, with the groups `name` and `argument`; without these groups, group 1 is
            the argument of the only tool. It must match in time linear in the text: write `[^>]*` rather than `.*`.

    Raises:
        ConfigError: If the pattern is not a regular expression, or has no group for the argument.

    Example:
        >>> PlainCalls().parse("12*3 is [calculator: 12*3]")
        [Call(name='calculator', arguments={}, text='12*3')]
        >>> PlainCalls(r"<<([^<>=]*)=>>").parse("It costs <<12*3=>>")
        [Call(name=None, arguments={}, text='12*3')]
    """

    def __init__(self, pattern: str | None = None) -> None:
        self._pattern = None if pattern is None else compile_pattern(pattern, flags=re.NOFLAG)
        groups = {} if self._pattern is None else self._pattern.groupindex
        self._argument: str | int = "argument" if "argument" in groups else 1
        self._named = self._pattern is None or "name" in groups
        if self._pattern is not None and self._argument == 1 and (self._pattern.groups != 1 or "name" in groups):
            raise ConfigError(
                f"PlainCalls: pattern={pattern!r}; give it one group, or groups (?P<name>...) and (?P<argument>...)"
            )

    def _calls(self, text: str, tools: Sequence[Schema]) -> Iterator[Call | MalformedCall]:
        if self._pattern is not None:
            for match in self._pattern.finditer(text):
                yield _plain_call(match["name"] if self._named else None, match[self._argument] or "")
            return
        others = [re.escape(name) for tool in tools if not re.fullmatch(_NAME, name := tool["function"]["name"])]
        head, end = re.compile(rf"\[({'|'.join([*others, _NAME])}):"), 0
        while begin := head.search(text, end):
            end = _closing(text, begin.end())
            if end < 0:  # later brackets are not closed either
                yield MalformedCall(f"the ] of [{begin[1][:40]}: is missing")
                return
            yield _plain_call(begin[1], text[begin.end() : end])

    def describe(self, tools: Sequence[Schema]) -> str:
        """See `CallFormat.describe`; if you set `pattern`, your prompts must describe the format."""
        lines = [f"{tool['function']['name']}: {tool['function']['description']}" for tool in tools]
        how = ["To call a tool, write its name and argument in brackets:"] if self._pattern is None else []
        example = [f"[{tools[0]['function']['name']}: ...]"] if how and tools else []
        return "\n".join(["You may call these tools.", *lines, *how, *example])

    def check(self, tools: Sequence[Schema]) -> None:
        """See `CallFormat.check`."""
        if not self._named and len(tools) != 1:
            raise ConfigError(f"PlainCalls: the pattern has no group (?P<name>...), but there are {len(tools)} tools; add one")


def _skip_space(text: str, begin: int) -> int:
    match = _SPACE.match(text, begin)
    assert match is not None
    return match.end()


def _read_json(text: str, begin: int) -> tuple[Call | MalformedCall, int]:
    """The call described by JSON at a position of a text, and the position after it."""
    begin = _skip_space(text, begin)
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except json.JSONDecodeError as error:
        return MalformedCall(f"the JSON is wrong: {error.msg} at character {error.pos - begin} of it"), begin
    except (ValueError, RecursionError):  # a number with too many digits; nested too deeply
        return MalformedCall("the JSON has a number that is too long, or is too deep"), begin
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str):
        return MalformedCall('the JSON must be an object with "name", a text'), end
    arguments = value.get("arguments", value.get("parameters"))
    arguments = parsed_json(arguments) if isinstance(arguments, str) else {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        return MalformedCall(f"the arguments of {shorten(name)} must be a JSON object, such as {{}}"), end
    return Call(name, arguments), end


def _plain_call(name: str | None, text: str) -> Call:
    text = text.strip()
    arguments = parsed_json(text) if text.startswith("{") else None
    return Call(name, arguments, text) if isinstance(arguments, dict) else Call(name, text=text)


def _closing(text: str, begin: int) -> int:
    """Position of the bracket that closes the one before `begin`; -1 if there is none."""
    begin = _skip_space(text, begin)
    if text.startswith("{", begin):
        with suppress(ValueError, RecursionError):  # not JSON
            end = _skip_space(text, _DECODER.raw_decode(text, begin)[1])
            if text.startswith("]", end):
                return end
    depth = 1
    for match in _BRACKET.finditer(text, begin):
        depth += 1 if match[0] == "[" else -1
        if depth == 0:
            return match.start()
    return -1
