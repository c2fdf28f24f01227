import re
import time
from itertools import product
from pathlib import Path

import pytest
import trl

from hybrid_lightning.environments.calls import Call, HermesCalls, LlamaCalls, MalformedCall, PlainCalls, choose_format
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


def test_a_policy_can_follow_its_description():
    examples = {HermesCalls: r"<tool_call>.*</tool_call>", LlamaCalls: r'\{"name": "\.\.\..*\}\}', PlainCalls: r"\[add: .*\]"}
    for form, example in examples.items():
        said = form().describe(TOOLS)
        assert "search" in said and "Does it." in said
        (call,) = form().parse(re.search(example, said)[0].replace('"...": ...', ""))
        assert isinstance(call, Call) and call.name in ("...", "add")


PARTS = ["<tool_call>", "<tool_call>{", '<tool_call>["', '<tool_call>["<tool_call>[", "', f"<tool_call>{ADD}"]
PARTS += ["[a:", "[a", "[", "{", f"{LLAMA};", " ", "[add: 1]"]


def test_long_messages_are_read_in_time_that_grows_with_their_length_alone():
    for begin, part in product(("", "<|python_tag|>", "<tool_call>", "[a:"), PARTS):
        for form in (HermesCalls(), LlamaCalls(), PlainCalls()):
            began = time.process_time()
            calls = form.parse(begin + part * (300_000 // len(part)))
            assert time.process_time() - began < 1, (form, part)  # in quadratic time it would be seconds and more
            assert len(calls) <= 101


def test_the_chat_template_says_which_form():
    def chosen(name):
        return type(choose_format((TEMPLATES / f"{name}.jinja").read_text())).__name__

    assert [chosen(name) for name in ("qwen2_5", "qwen3", "qwen3_training")] == ["HermesCalls"] * 3
    assert [chosen(name) for name in ("llama3_1", "llama3_2")] == ["LlamaCalls"] * 2
    assert [chosen(name) for name in ("llama3", "gemma", "phi3")] == ["PlainCalls"] * 3
    assert isinstance(choose_format(None), PlainCalls)
    for name in ("qwen3_5_think", "glm4moe", "gemma4"):
        with pytest.raises(ConfigError, match="give a call_format"):
            chosen(name)
