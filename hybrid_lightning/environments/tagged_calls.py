"""Call formats with tags or special tokens, and `choose_format`, which finds the format that a chat template teaches.

XmlCalls         <tool_call><function=search><parameter=query>...</parameter></function></tool_call>    Qwen 3.5 on, Nemotron 3
GlmCalls         <tool_call>search<arg_key>query</arg_key><arg_value>...</arg_value></tool_call>        GLM-4.5 on
AtemCalls        <atem:invoke name="search"><atem:parameter name="query">...</atem:parameter></atem:invoke>
HarmonyCalls     <|channel|>commentary to=functions.search<|message|>{"query": "..."}<|call|>           gpt-oss
PythonicCalls    <|tool_call_start|>[search(query="...")]<|tool_call_end|>                              LFM2, LFM2.5-VL
RawPythonicCalls <|tool_call_start|>[search(query='...')]<|tool_call_end|>                              LFM2.5
GemmaCalls       <|tool_call>call:search{query:<|"|>...<|"|>}<tool_call|>                               Gemma 4

Each parser follows the chat templates of these models.
"""

import ast
import json
import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from hybrid_lightning.environments.calls import (
    Call,
    CallFormat,
    MalformedCall,
    Schema,
    TemplateFormat,
    parsed_json,
    typed_arguments,
)
from hybrid_lightning.environments.json_calls import DeepSeekCalls, HermesCalls, LlamaCalls, PlainCalls
from hybrid_lightning.errors import ConfigError, one_line

_MAX_CHARS = 100_000  # per call: Python's parser needs much memory for more


class _TextArguments(TemplateFormat):
    """Base of formats that write each argument as a text between tags, without its type."""

    OPEN: ClassVar[str]  # begins a call
    CLOSE: ClassVar[str]  # ends a call
    _name: ClassVar[re.Pattern[str]]  # beginning of a call; group 1 is its name
    _argument: ClassVar[re.Pattern[str]]  # beginning of an argument; group 1 is its name
    _argument_end: ClassVar[str]
    _end: ClassVar[str] = ""  # may follow the arguments
    _line_end: ClassVar[str] = ""  # may follow a value without being part of it

    def _calls(self, text: str, tools: Sequence[Schema]) -> Iterator[Call | MalformedCall]:
        return (self._call(body, tools) for body in _between(text, self.OPEN, self.CLOSE))

    def _call(self, body: str | None, tools: Sequence[Schema]) -> Call | MalformedCall:
        if body is None:
            return MalformedCall(f"{self.CLOSE} is missing")
        body = body.strip()
        named = self._name.match(body)
        texts: dict[str, str] = {}
        before, *rest = self._argument.split(body[named.end() :].removesuffix(self._end) if named else "")
        for name, text in zip(rest[::2], rest[1::2], strict=True):
            value, closed, after = text.partition(self._argument_end)
            texts[name.strip()] = value.removesuffix(self._line_end)
            named = named if closed and not after.strip() else None
        if named is None or before.strip():
            return MalformedCall(f"it is not of the form {self._example}")
        return Call(named[1].strip(), typed_arguments(named[1].strip(), texts, tools))


class XmlCalls(_TextArguments):
    r"""The format in chat templates of Qwen 3.5 and later, and of Nemotron 3. Values get the types of the tool's schema.

    Example:
        >>> XmlCalls().parse("<tool_call>\n<function=add>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>")
        [Call(name='add', arguments={'x': '1'}, text=None)]
    """

    OPEN, CLOSE = "<tool_call>", "</tool_call>"
    _name, _end, _line_end = re.compile(r"<function=([^<>\n]+)>"), "</function>", "\n"
    _argument, _argument_end = re.compile(r"<parameter=([^<>\n]+)>\n?"), "</parameter>"
    _example = "<tool_call>\n<function=NAME>\n<parameter=ARGUMENT>\nvalue\n</parameter>\n</function>\n</tool_call>"


class GlmCalls(_TextArguments):
    r"""The format in chat templates of GLM-4.5 and later. Values get the types of the tool's schema.

    Example:
        >>> GlmCalls().parse("<tool_call>add\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>")
        [Call(name='add', arguments={'x': '1'}, text=None)]
    """

    OPEN, CLOSE = "<tool_call>", "</tool_call>"
    _name = re.compile(r"([^<>\n]+)")
    _argument, _argument_end = re.compile(r"<arg_key>([^<]*)</arg_key>\s*<arg_value>"), "</arg_value>"
    _example = "<tool_call>NAME\n<arg_key>ARGUMENT</arg_key>\n<arg_value>value</arg_value>\n</tool_call>"


class AtemCalls(_TextArguments):
    r"""The format of templates with `atem:` tags. Values get the types of the tool's schema; calls in thoughts do not count.

    Example:
        >>> AtemCalls().parse('<atem:invoke name="add">\n<atem:parameter name="x">1</atem:parameter>\n</atem:invoke>')
        [Call(name='add', arguments={'x': '1'}, text=None)]
    """

    OPEN, CLOSE = '<atem:invoke name="', "</atem:invoke>"
    _name = re.compile(r'([^"<>\n]+)">')
    _argument, _argument_end = re.compile(r'<atem:parameter name="([^"<>\n]+)">'), "</atem:parameter>"
    _example = '<atem:invoke name="NAME">\n<atem:parameter name="ARGUMENT">value</atem:parameter>\n</atem:invoke>'

    def _calls(self, text: str, tools: Sequence[Schema]) -> Iterator[Call | MalformedCall]:
        return super()._calls(re.sub(r"\bto=self<\|message\|>[^<]*(?:<(?!\|eom\|>)[^<]*)*", "", text), tools)


class HarmonyCalls(TemplateFormat):
    """The format of gpt-oss: a message to a function in the channel `commentary`. Other messages are thoughts and answers.

    Example:
        >>> HarmonyCalls().parse('<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"x": 1}')
        [Call(name='add', arguments={'x': 1}, text=None)]
    """

    _to = re.compile(r"to=functions\.([^\s<]+)")
    _example = '<|channel|>commentary to=functions.NAME<|message|>{"ARGUMENT": ...}<|call|>'

    def _calls(self, text: str, tools: Sequence[Schema]) -> Iterator[Call | MalformedCall]:
        for message in re.split(r"<\|start\|>|<\|end\|>|<\|call\|>|<\|return\|>", text):
            head, written, body = message.partition("<|message|>")
            to = self._to.search(head)
            if to is None:
                continue
            arguments = parsed_json(body) if body.strip() else {}
            if not written:
                yield MalformedCall("it ends before its arguments")
            elif isinstance(arguments, dict):
                yield Call(to[1], arguments)
            else:
                yield MalformedCall(f"the arguments of {to[1][:40]} must be a JSON object, such as {{}}")


class PythonicCalls(TemplateFormat):
    """The format of LFM2 and LFM2.5-VL: a list of calls as Python writes them, with constants as arguments.

    Example:
        >>> PythonicCalls().parse('<|tool_call_start|>[add(x=1), search(query="two")]<|tool_call_end|>')
        [Call(name='add', arguments={'x': 1}, text=None), Call(name='search', arguments={'query': 'two'}, text=None)]
    """

    OPEN, CLOSE = "<|tool_call_start|>", "<|tool_call_end|>"
    _example, _when = f"{OPEN}[NAME(ARGUMENT=...)]{CLOSE}", "with all calls in one list"
    _raw: ClassVar[bool] = False  # whether texts between single quotes have no escapes

    def _calls(self, text: str, tools: Sequence[Schema]) -> Iterator[Call | MalformedCall]:
        for body in _between(text, self.OPEN, self.CLOSE):
            if body is None:
                yield MalformedCall(f"{self.CLOSE} is missing")
                continue
            try:
                if len(body) > _MAX_CHARS:
                    raise ValueError("it is too long")
                written = ast.parse(_with_literals(body.strip(), tools, self._raw), mode="eval").body
                for node in written.elts if isinstance(written, ast.List) else [written]:
                    yield _python_call(node)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                yield MalformedCall(f"it is not a list of Python calls with constants: {one_line(error)[:100]}")


class RawPythonicCalls(PythonicCalls):
    r"""The format of LFM2.5: as `PythonicCalls`, but a text between single quotes is as it is written, its backslashes too.

    Between double quotes, and in lists and dicts, the escapes of Python hold.

    Example:
        >>> RawPythonicCalls().parse(r"<|tool_call_start|>[show(path='C:\new', text='it's')]<|tool_call_end|>")
        [Call(name='show', arguments={'path': 'C:\\new', 'text': "it's"}, text=None)]
    """

    _raw: ClassVar[bool] = True


class GemmaCalls(TemplateFormat):
    """The format of Gemma 4, with texts between `<|"|>` and names without quotes. Calls in thoughts do not count.

    Example:
        >>> GemmaCalls().parse('<|tool_call>call:search{limit:3,query:<|"|>a, "b"<|"|>}<tool_call|>')
        [Call(name='search', arguments={'limit': 3, 'query': 'a, "b"'}, text=None)]
    """

    OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
    _example = f"{OPEN}call:NAME{{ARGUMENT:{QUOTE}text{QUOTE}}}{CLOSE}"
    _head = re.compile(r"\s*call:([^\s{]+)\s*(?=\{)")
    _name = re.compile(r"([{,]\s*)([^\s{}\[\],:\"]+)(?=\s*:)")
    _none = re.compile(r"(?<=[:,\[])None(?=[,}\]])")  # its first templates write it this way

    def _calls(self, text: str, tools: Sequence[Schema]) -> Iterator[Call | MalformedCall]:
        without_thoughts = re.sub(r"<\|channel>[^<]*(?:<(?!channel\|>)[^<]*)*(?:<channel\|>)?", "", text)
        _, *rest = without_thoughts.split(self.OPEN)  # the tag is a token of its own and does not occur in text
        for call in rest:
            body, closed, _ = call.rpartition(self.CLOSE)
            head = self._head.match(body)
            if not closed or head is None:
                yield MalformedCall(f"{self.CLOSE} is missing" if not closed else "it does not begin with call:NAME{")
                continue
            parts = body[head.end() :].split(self.QUOTE)  # every second one is a text
            parts[1::2] = map(json.dumps, parts[1::2])
            parts[::2] = [self._none.sub("null", self._name.sub(r'\1"\2"', part)) for part in parts[::2]]
            arguments = parsed_json("".join(parts)) if len(parts) % 2 else None
            if isinstance(arguments, dict):
                yield Call(head[1], arguments)
            else:
                yield MalformedCall(f"the arguments of {head[1][:40]} cannot be read; write {{name:value,...}}")


# Text in a chat template -> the format that it teaches; the first match counts.
_TAUGHT: tuple[tuple[str, type[CallFormat]], ...] = (
    ("<function=", XmlCalls),
    ("<arg_key>", GlmCalls),
    ("<atem:invoke", AtemCalls),
    (r"<\|channel\|>commentary", HarmonyCalls),
    (r"(?s)\A(?=.*<\|tool_call_start\|>).*\"'\" \+ arg_value \+ \"'\"", RawPythonicCalls),
    (r"<\|tool_(call_start|list_start)\|>", PythonicCalls),
    (r"<\|tool_call>call:", GemmaCalls),
    ("<｜tool▁call▁begin｜>", DeepSeekCalls),
    ("<tool_call>", HermesCalls),
    ("python_tag|ipython", LlamaCalls),
)


def choose_format(chat_template: str | None) -> CallFormat:
    """The format that a chat template teaches.

    Raises:
        ConfigError: If it teaches an unknown format.
    """
    template = chat_template or ""
    for pattern, kind in _TAUGHT:
        if re.search(pattern, template):
            return kind()
    if shows_tools(template):
        known = ", ".join(kind.__name__ for _, kind in _TAUGHT)
        raise ConfigError(
            "the chat template shows tools in an unknown format; set call_format to the format that the model writes: one of "
            f"{known}, PlainCalls with a pattern, or your own class"
        )
    return PlainCalls()


def shows_tools(chat_template: str | None) -> bool:
    """Whether a chat template accepts tools."""
    return re.search(r"\{%-?\s*(if|elif|for)\b[^%]*\btools\b", chat_template or "") is not None


def _between(text: str, begin: str, end: str) -> Iterator[str | None]:
    """The texts between two tags; None for an unclosed one."""
    for part in text.split(begin)[1:]:
        body, closed, _ = part.partition(end)
        yield body if closed else None


_PIECE = re.compile(  # of Python's source: the name of an argument that is a text, a text, a bracket
    r"""(?P<argument>[(,]\s*[A-Za-z_]\w*\s*=\s*(?=['"]))|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[\[({]|[\])}]""", re.DOTALL
)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


def _with_literals(body: str, tools: Sequence[Schema], raw: bool) -> str:
    """A list of calls in which texts are Python's literals.

    A single quote ends a raw text if the name of another argument or the end of the call follows, by the tools' schemas if they
    are known.
    """
    arguments = {tool["function"]["name"]: tool["function"].get("parameters", {}).get("properties", {}) for tool in tools}
    names = "|".join(map(re.escape, arguments)) or r"[\w.-]+"
    done, end, closing = list[str](), 0, re.compile("")
    within = list[str]()  # the open brackets
    while piece := _PIECE.search(body, end):
        begin, first = piece.end(), piece[0][0]
        plain_text = (
            first in "'\"" and not body[max(0, piece.start() - 1) : piece.start()].isalpha()
        )  # r"..." and the like are left to Python
        done += [body[end : piece.start()], _literal(piece[0]) if plain_text else piece[0]]
        end = begin
        del within[len(within) - (first in "])}") :]
        within += [first] * (first in "[({")
        if first == "(" and within in (["("], ["[", "("]):
            name = re.split(r"[^\w.-]", body[max(0, piece.start() - 100) : piece.start()])[-1]
            if name in arguments and "-" in name:  # not a name in Python
                done[-2] = f"{done[-2].removesuffix(name)}_[{name!r}]"
            known = "|".join(map(re.escape, arguments.get(name, ()))) or r"[A-Za-z_]\w*"
            closing = re.compile(rf"'(?=\s*(?:,\s*(?:{known})\s*=|\)\s*(?:\]?\s*\Z|,\s*(?:{names})\()))")
        raw_text = raw and piece["argument"] and within in (["("], ["[", "("]) and body[begin] == "'"
        if raw_text and (quote := closing.search(body, begin + 1)):
            end = quote.end()
            done.append(repr(body[begin + 1 : quote.start()]))
    return "".join([*done, body[end:]])


def _literal(text: str) -> str:
    """A text in quotes as Python's literal; it may contain line breaks, and backslashes that begin no escape."""
    literal = _ESCAPE.sub(lambda found: found[0] if found[1] in "\\'\"abfnrtv01234567xuUN\n" else f"\\{found[0]}", text)
    literal = literal.replace("\n", "\\n")
    try:
        if "\\" in text:
            ast.parse(literal, mode="eval")
    except SyntaxError:  # such as "C:\Users", whose \U begins a character's number
        return repr(text[1:-1])
    return literal


def _python_call(node: ast.expr) -> Call | MalformedCall:
    """The call that a Python syntax node represents; ValueError if an argument is not a constant."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, (ast.Name, ast.Attribute, ast.Subscript)):
        return MalformedCall("it is not of the form NAME(ARGUMENT=...)")
    name = str(ast.literal_eval(node.func.slice)) if isinstance(node.func, ast.Subscript) else ast.unparse(node.func)
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        return MalformedCall(f"the arguments of {name[:40]} must have names")
    return Call(
        name,
        {str(keyword.arg): ast.literal_eval(_Constants().visit(keyword.value)) for keyword in node.keywords},
    )


class _Constants(ast.NodeTransformer):
    """Replaces JSON's constants by Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        names = {"true": True, "false": False, "null": None}
        return ast.Constant(names[node.id]) if node.id in names else node
