import time
from itertools import product
from pathlib import Path

import pytest
import trl
from chat_templates import tokenizer_with

from hybrid_lightning.environments import (
    AtemCalls,
    Call,
    GemmaCalls,
    GlmCalls,
    HarmonyCalls,
    HermesCalls,
    LlamaCalls,
    MalformedCall,
    PlainCalls,
    PythonicCalls,
    XmlCalls,
)
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
    ):
        assert [short(call) for call in PlainCalls().parse(text)] == calls


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
]
BEGINS = ("", "<|python_tag|>", "<tool_call>", "[a:", "<tool_call><function=a>", "<|tool_call_start|>", "<|tool_call>call:a{")
ENDS = {PythonicCalls: PythonicCalls.CLOSE, GemmaCalls: GemmaCalls.CLOSE, XmlCalls: "</tool_call>"}


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
    PythonicCalls: ("lfm2_v2", "lfm2_2_5_v2"),
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
        (GemmaCalls(), "<|channel>thought\n<|tool_call>call:f{}<tool_call|>", []),
        (
            GemmaCalls(),
            '<|tool_call>call:f{a:<|"|>}<tool_call|><|tool_call>f{}<tool_call|><|tool_call>call:f{',
            ["malformed"] * 3,
        ),
    ):
        assert [short(call) for call in form.parse(text)] == calls, text
