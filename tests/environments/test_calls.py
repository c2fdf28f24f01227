import time
from itertools import product
from pathlib import Path

import pytest
import trl
from chat_templates import tokenizer_with

from hybrid_lightning.environments import (
    AtemCalls,
    Call,
    DeepSeekCalls,
    GemmaCalls,
    GlmCalls,
    HarmonyCalls,
    HermesCalls,
    LlamaCalls,
    MalformedCall,
    PlainCalls,
    PythonicCalls,
    RawPythonicCalls,
    XmlCalls,
)
from hybrid_lightning.environments.calls import typed_arguments, typed_value
from hybrid_lightning.environments.tagged_calls import choose_format, shows_tools
from hybrid_lightning.errors import ConfigError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "Does it.", "parameters": {}}} for name in ("add", "search")
]


def short(call):
    return "malformed" if isinstance(call, MalformedCall) else (call.name, dict(call.arguments) or call.text or {})


def hermes(text):
    return f"<tool_call>{text}</tool_call>"


ADD = '{"name": "add", "arguments": {"x": 1}}'


def test_hermes():
    for text, calls in (
        ("The answer is {1}.", []),
        (f"I add.\n{hermes(f' {ADD} ')} and {hermes(ADD)}.", [("add", {"x": 1})] * 2),
        (hermes('{"name": "f", "arguments": {"a": {"b": [{}, "}</tool_call>"]}}}'), [("f", {"a": {"b": [{}, "}</tool_call>"]}})]),
        (hermes('{"name": "add", "arguments": "{\\"x\\": 1}"}'), [("add", {"x": 1})]),
        (hermes('{"name": "now"}') + hermes('{"name": "now", "arguments": null}'), [("now", {})] * 2),
        (f"<tool_call>{ADD}", ["malformed"]),
        ("I call <tool_c", ["malformed"]),
        (hermes('{"name": "add", "arguments": {"x": 1}') + hermes(ADD), ["malformed", ("add", {"x": 1})]),
        (hermes("add(1)") + hermes('["add"]') + hermes('{"name": 3}'), ["malformed"] * 3),
        (hermes('{"name": "add", "arguments": [1]}') + hermes('{"name": "add", "arguments": "one"}'), ["malformed"] * 2),
        (hermes(ADD) * 101, [("add", {"x": 1})] * 100 + ["malformed"]),
        (hermes("[" * 100_000) + hermes("1" * 5_000), ["malformed"] * 2),
    ):
        assert [short(call) for call in HermesCalls().parse(text)] == calls


LLAMA = '{"name": "add", "parameters": {"x": 1}}'


def test_llama():
    for text, calls in (
        ('{"answer": 3}', []),
        (f" {LLAMA}\n", [("add", {"x": 1})]),
        (f"Let me.<|python_tag|>{LLAMA}; {LLAMA}", [("add", {"x": 1})] * 2),
        (f'{LLAMA}; {{"name": "add"', [("add", {"x": 1}), "malformed"]),
        ("<|python_tag|>print(3)", ["malformed"]),
        ('{"parameters": {"x": 1}}', ["malformed"]),
    ):
        assert [short(call) for call in LlamaCalls().parse(text)] == calls


def test_plain():
    for text, calls in (
        ("It is 3 [1].", []),
        ("a [add: 1 + 1] and [search:two\nlines]", [("add", "1 + 1"), ("search", "two\nlines")]),
        ("[python: x[0] + y[z[1]]]", [("python", "x[0] + y[z[1]]")]),
        ('[add: {"x": 1, "y": [2]}]', [("add", {"x": 1, "y": [2]})]),
        ("[add: {1}] [now:]", [("add", "{1}"), ("now", {})]),
        ("[add: 1] [add: 2", [("add", "1"), "malformed"]),
        ("[my-server.add: 1] [a.b-c:]", [("my-server.add", "1"), ("a.b-c", {})]),
        ('[add: {"x": "]", "y": "[["}] and [add: {"x": "]"} ]', [("add", {"x": "]", "y": "[["}), ("add", {"x": "]"})]),
        ('[add: {"x": "a]", }] [add: 2]', [("add", '{"x": "a'), ("add", "2")]),
    ):
        assert [short(call) for call in PlainCalls().parse(text)] == calls
    odd = [{"type": "function", "function": {"name": name, "description": ""}} for name in ("2nd/add", "a b")]
    assert [call.name for call in PlainCalls().parse("[2nd/add: 1] [a b: 2] [c d: 3]", odd)] == ["2nd/add", "a b"]


def test_plain_by_patterns():
    assert PlainCalls("<<(.*?)=>").parse("<<12*3=> <<4=>") == [Call(None, text="12*3"), Call(None, text="4")]
    named = PlainCalls(r"(?P<name>\w+)\((?P<argument>[^()]*)\)")
    assert [short(call) for call in named.parse("add(1)")] == [("add", "1")]
    for pattern in ("(", "a", "(a)(b)", "(?P<name>a)(b)"):
        with pytest.raises(ConfigError, match="pattern="):
            PlainCalls(pattern)
    named.check(TOOLS)
    with pytest.raises(ConfigError, match="2 tools"):
        PlainCalls("<<(.*?)=>").check(TOOLS)


FORMATS = (HermesCalls, LlamaCalls, PlainCalls, XmlCalls, GlmCalls, AtemCalls, HarmonyCalls, PythonicCalls, GemmaCalls)
FORMATS += (RawPythonicCalls, DeepSeekCalls)


def test_a_policy_can_follow_its_description():
    for form in FORMATS:
        said, example = form().describe(TOOLS), "[add: ...]" if form is PlainCalls else form._example
        assert "search" in said and "Does it." in said and example in said
        (call,) = form().parse(example.replace('"...": ...', "").replace("...", "1"))
        assert isinstance(call, Call) and call.name in ("1", "add", "NAME")


PARTS = ["<tool_call>", "<tool_call>{", '<tool_call>["', '<tool_call>["<tool_call>[", "', f"<tool_call>{ADD}"]
PARTS += ["[a:", "[a", "[", "{", f"{LLAMA};", " ", "[add: 1]"]
PARTS += ["<tool_call><function=a>", "<parameter=a>", "<arg_key>a</arg_key>", "<arg_key>", '<atem:invoke name="a">', "a=", "-"]
PARTS += [
    "to=functions.a<|message|>",
    "<|start|>",
    "<|tool_call_start|>[",
    "f(a=[",
    "<|tool_call>call:a{",
    "<|channel>",
    '<|"|>',
    "a:",
    *("a='", "', a='", "'), f(", DeepSeekCalls.OPEN, f"{DeepSeekCalls.OPEN}f<｜tool▁sep｜>", "```json", "[a:{", '{"a":['),
]
BEGINS = ("", "<|python_tag|>", "<tool_call>", "[a:", "<tool_call><function=a>", "<|tool_call_start|>", "<|tool_call>call:a{")
BEGINS += ("<|tool_call_start|>[f(a='", DeepSeekCalls.OPEN, f"{DeepSeekCalls.OPEN}f<｜tool▁sep｜>")
ENDS = {
    PythonicCalls: PythonicCalls.CLOSE,
    RawPythonicCalls: PythonicCalls.CLOSE,
    DeepSeekCalls: DeepSeekCalls.CLOSE,
    GemmaCalls: GemmaCalls.CLOSE,
    XmlCalls: "</tool_call>",
}


def test_long_messages_are_read_in_time_that_grows_with_their_length_alone():
    for begin, part in product(BEGINS, PARTS):
        for kind in FORMATS:
            text = begin + part * (100_000 // len(part)) + ENDS.get(kind, "")
            began = time.process_time()
            calls = kind().parse(text)
            assert time.process_time() - began < 1, (kind, begin, part)  # in quadratic time it would be seconds and more
            assert len(calls) <= 101


# Format -> names of TRL's templates that teach it.
TAUGHT = {
    HermesCalls: ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"),
    XmlCalls: ("qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8", "nemotron_3_nano", "nemotron_3_5_lightning"),
    GlmCalls: ("glm4moe",),
    AtemCalls: ("muse_glimmer",),
    HarmonyCalls: ("gptoss",),
    PythonicCalls: ("lfm2_v2", "lfm2_2_5_vl"),
    RawPythonicCalls: ("lfm2_2_5", "lfm2_2_5_v2"),
    DeepSeekCalls: ("deepseekv3_training",),
    GemmaCalls: ("gemma4", "gemma4_v2", "gemma4_v5"),
    LlamaCalls: ("llama3_1", "llama3_2"),
}
PROPERTIES = {
    "query": {"type": "string"},
    "limit": {"type": "integer"},
    "exact": {"type": "boolean"},
    "share": {"type": "number"},
    "tags": {"type": "array"},
    "options": {"type": "object"},
}
FIND = {"type": "function", "function": {"name": "find", "description": "Find.", "parameters": {"properties": PROPERTIES}}}
ARGUMENTS = {
    "query": 'a "b"\nc: {d} 1',
    "limit": 3,
    "exact": True,
    "share": 0.5,
    "tags": ["x", "y, z"],
    "options": {"k": 1, "l": [True, None]},
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in TAUGHT.items() for name in names])
def test_the_format_that_a_template_teaches_is_found_and_reads_what_the_template_writes(kind, name):
    tokenizer = tokenizer_with(name, "<|im_end|>")
    chosen = choose_format(tokenizer.chat_template)
    function = {"name": "find", "arguments": ARGUMENTS}
    asked = [{"role": "user", "content": "Find it."}]
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "1", "function": function}]}
    opened = tokenizer.apply_chat_template(asked, tools=[FIND], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*asked, called], tools=[FIND], tokenize=False)
    assert isinstance(chosen, kind)
    begins = next(place for place, pair in enumerate(zip(opened + "\0", whole, strict=False)) if pair[0] != pair[1])
    assert chosen.parse(whole[begins:], [FIND]) == [Call("find", ARGUMENTS)]


def test_templates_without_tools_have_plain_calls_and_unknown_formats_are_refused():
    for name in ("llama3", "gemma", "phi3"):
        assert isinstance(choose_format((TEMPLATES / f"{name}.jinja").read_text()), PlainCalls)
    assert isinstance(choose_format(None), PlainCalls)
    odd = "{% if tools %}{{ tools }}{% endif %}"
    assert shows_tools(odd)
    with pytest.raises(ConfigError, match="set call_format"):
        choose_format(odd)


def test_the_schema_decides_which_type_a_text_has():
    for text, schema, value in (
        ("3", {"type": "string"}, "3"),
        ("None", {"type": "string"}, "None"),
        *((text, {"type": "string", "nullable": True}, None) for text in ("None", "null")),
        ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("3", {"type": "string", "nullable": True}, "3"),
        ("True", {"type": "string", "nullable": True}, "True"),
        ("3", {"type": ["integer", "string"]}, 3),
        ("3.5", {"type": ["integer", "string"]}, "3.5"),
        ("true", {"type": ["integer", "string"]}, "true"),
        ("[1]", {"type": ["array", "string"]}, [1]),
        ("2", {"enum": ["1", "2"]}, "2"),
        ("2", {"enum": ["1", 2]}, 2),
        ("a", {"type": "integer"}, "a"),  # which the schema then refuses
        ("2.5", {"type": "integer"}, 2.5),
    ):
        assert typed_value(text, schema) == value and type(typed_value(text, schema)) is type(value), (text, schema)
    parameters = {"properties": {"x": {"$ref": "#/$defs/Size"}}, "$defs": {"Size": {"type": ["integer", "null"]}}}
    tool = {"function": {"name": "f", "parameters": parameters}}
    assert typed_arguments("f", {"x": "None", "y": "1"}, [tool]) == {"x": None, "y": "1"}


def test_texts_in_pythons_calls_are_read_as_the_template_writes_them():
    call = "<|tool_call_start|>[f({})]<|tool_call_end|>".format
    for text, escaped, raw in (
        (r"a='C:\new'", "C:\new", r"C:\new"),
        (r"a='C:\\new'", r"C:\new", r"C:\\new"),
        (r"a='C:\\8'", r"C:\8", r"C:\\8"),
        (r"a='it\'s'", "it's", r"it\'s"),
        (r"a=r'C:\new'", r"C:\new", r"C:\new"),
        (r"a=['C:\dir', 'C:\\new']", [r"C:\dir", r"C:\new"], [r"C:\dir", r"C:\new"]),
        ("a='it's'", None, "it's"),
        ("a='print('x'), h('y')'", None, "print('x'), h('y')"),
        (r"a='C:\Users\data'", r"C:\Users\data", r"C:\Users\data"),
        (r'a="C:\\new"', r"C:\new", r"C:\new"),
        ('a="one\ntwo"', "one\ntwo", "one\ntwo"),
        (r'a="C:\Users\data"', r"C:\Users\data", r"C:\Users\data"),
    ):
        for form, value in ((PythonicCalls(), escaped), (RawPythonicCalls(), raw)):
            expected = "malformed" if value is None else ("f", {"a": value})
            assert [short(one) for one in form.parse(call(text), [tool_of("f", "a"), tool_of("g", "a")])] == [expected], text
    dashed = [tool_of("my-server.find", "a")]
    assert PythonicCalls().parse("<|tool_call_start|>[my-server.find(a=1)]<|tool_call_end|>", dashed) == [
        Call("my-server.find", {"a": 1})
    ]


DEEPSEEK = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>".format


def tool_of(name, *arguments):
    parameters = {"type": "object", "properties": {name: {"type": "string"} for name in arguments}}
    return {"type": "function", "function": {"name": name, "description": "Does it.", "parameters": parameters}}


def test_what_tagged_formats_cannot_read_is_malformed():
    xml, glm = "<tool_call>\n<function=f>\n{}</function>\n</tool_call>".format, "<tool_call>f\n{}</tool_call>".format
    for form, text, calls in (
        (XmlCalls(), xml("<parameter=x>\n\n 1\n</parameter>\n") + xml(""), [("f", {"x": "\n 1"}), ("f", {})]),
        (XmlCalls(), xml("<parameter=x>1") + xml("1") + "<tool_call>f(1)</tool_call>" + xml("")[:-3], ["malformed"] * 4),
        (XmlCalls(), "no call", []),
        (
            GlmCalls(),
            glm("") + glm("<arg_key>x</arg_key>1") + glm("<arg_key>x</arg_key><arg_value>1"),
            [("f", {})] + ["malformed"] * 2,
        ),
        (AtemCalls(), 'to=self<|message|><atem:invoke name="f"></atem:invoke>', []),
        (
            AtemCalls(),
            'to=self<|message|>f?<|eom|><|start|>assistant to=f<|message|><atem:invoke name="f"></atem:invoke>',
            [("f", {})],
        ),
        (
            HarmonyCalls(),
            "<|channel|>analysis<|message|>to=functions.f {}<|end|><|start|>assistant<|channel|>final<|message|>3",
            [],
        ),
        (HarmonyCalls(), "<|channel|>commentary to=functions.f json<|message|>", [("f", {})]),
        (HarmonyCalls(), " to=functions.f<|channel|>commentary<|message|>[1]<|call|> to=functions.f", ["malformed"] * 2),
        (
            PythonicCalls(),
            "<|tool_call_start|>[f(), g.h(x=-1, y={'a': null})]<|tool_call_end|>",
            [("f", {}), ("g.h", {"x": -1, "y": {"a": None}})],
        ),
        (PythonicCalls(), "<|tool_call_start|>[f(x=g()), f(1)]<|tool_call_end|><|tool_call_start|>f(", ["malformed"] * 2),
        (PythonicCalls(), "<|tool_call_start|>[f(1), 2]<|tool_call_end|>", ["malformed"] * 2),
        (
            GemmaCalls(),
            '<|tool_call>call:f{}<tool_call|><|tool_call>call:g{a:{<|"|>b<|"|>:[1]}}<tool_call|>',
            [("f", {}), ("g", {"a": {"b": [1]}})],
        ),
        (DeepSeekCalls(), f"{DeepSeekCalls.OPEN}f<｜tool▁sep｜>{{}}{DeepSeekCalls.CLOSE}", [("f", {})]),  # as V3.1 writes it
        (DeepSeekCalls(), DEEPSEEK("[1]") + DEEPSEEK("{x}") + DEEPSEEK("")[:-3], ["malformed"] * 3),
        (DeepSeekCalls(), DEEPSEEK('{"x": "```"}') + DEEPSEEK("{}"), [("f", {"x": "```"}), ("f", {})]),
        (GemmaCalls(), "<|channel>thought\n<|tool_call>call:f{}<tool_call|>", []),
        (
            GemmaCalls(),
            '<|tool_call>call:f{a:<|"|>}<tool_call|><|tool_call>f{}<tool_call|><|tool_call>call:f{',
            ["malformed"] * 3,
        ),
    ):
        assert [short(call) for call in form.parse(text)] == calls, text
