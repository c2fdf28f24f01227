import asyncio
import dataclasses
import json
import time
from enum import Enum
from typing import Any, Literal

import numpy as np
import pytest
import torch
from environments_in_turns import EnvironmentsInTurns
from test_calls import TEMPLATES

from hybrid_lightning.environments import CUT_MARK, EpisodeLimits, HermesCalls, PlainCalls, Tool, ToolEnvironment
from hybrid_lightning.environments.calls import Call
from hybrid_lightning.environments.tool import describe_tool
from hybrid_lightning.environments.tool_environment import COUNTS, as_text
from hybrid_lightning.errors import ConfigError, SandboxError
from hybrid_lightning.types import Prompt

CHAT = Prompt(messages=({"role": "user", "content": "Add."},))


class Size(Enum):
    SMALL = "s"
    LARGE = "l"


def add(x: int, y: float = 1.0) -> float:
    """Add two numbers.

    Example:
        >>> add(1, 2)
        3

    Args:
        x: The first one.
        y: The second one, which
            may be left out.

    Raises:
        Nothing.
    """
    return x + y


def give(kind: str) -> object:
    """Give something.

    Args:
        kind: What.
    """
    if kind == "hang":
        time.sleep(1_000)
    if kind == "raise":
        raise KeyError("no\nsuch thing")
    if kind == "exit":
        raise SystemExit
    if kind == "timeout":
        raise TimeoutError("by itself")
    if kind == "stop":
        raise SandboxError("no sandbox")
    values = {"none": None, "list": [1, "ä"], "bytes": b"\xff1", "object": Size.SMALL, "long": "x" * 10_000, "odd": "\ud800"}
    return values[kind]


async def wait(seconds: float) -> str:
    """Wait.

    Args:
        seconds: How long.
    """
    WAITED.append(seconds)
    await asyncio.sleep(seconds)
    return "waited"


def sleep(seconds: float) -> str:
    """Sleep.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    return "slept"


WAITED = []


class Notes(Tool):
    """Kept for an episode."""

    closed = 0

    def __init__(self, first: str = "note"):
        self.first = first

    def start(self, seed):
        self.kept = [f"{self.first} {seed}"]

    def __call__(self, text: str) -> list[str]:
        """Keep a text.

        Args:
            text: The text.
        """
        self.kept.append(text)
        return self.kept

    def close(self):
        Notes.closed += 1


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def answers(environment, *texts, seeds=None, **limits):
    """Steps of an episode for each text, all at the same time."""
    episodes = EnvironmentsInTurns(environment, EpisodeLimits(**limits))
    try:
        episodes.start([CHAT] * len(texts), seeds or [1] * len(texts))
        return list(episodes.step({n: {"role": "assistant", "content": text} for n, text in enumerate(texts)}).values())
    finally:
        episodes.close()


def hermes(tools, **arguments):
    return ToolEnvironment(tools, HermesCalls(), **arguments)


def told(step):
    return [message["content"] for message in step.messages]


def counted(step):
    assert set(step.counts) == set(COUNTS)
    return {name.removeprefix("failed_calls/"): count for name, count in step.counts.items() if count}


def test_calls_are_answered_in_order_and_an_answer_ends_the_episode():
    text = f"<think>{call('add', x=5)}</think>First {call('add', x=1)} then {call('add', x=1, y=2.5)}."
    step, last = answers(hermes([add]), text, "<think>3?</think>It is 3.")
    assert step.messages == ({"role": "tool", "name": "add", "content": "2.0"}, {"role": "tool", "name": "add", "content": "3.5"})
    assert (step.over, step.reward, counted(step)) == (False, 0.0, {"calls": 2})
    assert (last.over, last.end, last.reward, last.messages, counted(last)) == (True, "answered", 0.0, (), {})


TOLD = [
    ("<tool_call>add(1)</tool_call>", "unparsable", "error: the call cannot be read: the JSON is wrong"),
    (call("sub", x=1), "unknown_tool", "error: there is no tool 'sub'; the tools are add, give"),
    (call("add"), "arguments", "error: add got wrong arguments: 'x' is a required property; its arguments are x, y"),
    (call("add", x=1, z=2), "arguments", "error: add got wrong arguments: Additional properties are not allowed ('z' was"),
    (call("give", kind="raise"), "raised", "error: give raised KeyError: 'no\\nsuch thing'"),
    (call("give", kind="exit"), "raised", "error: give raised SystemExit: SystemExit"),
    (call("give", kind="timeout"), "raised", "error: give raised TimeoutError: by itself"),
    (call("give", kind="hang"), "time", "error: give was not done after 1 s"),
    (call("give", kind="long"), "cut", "x" * 500 + CUT_MARK),
    (call("give", kind="none"), None, "(the tool returned nothing)"),
    (call("give", kind="list"), None, '[1, "ä"]'),
    (call("give", kind="bytes"), None, "\ufffd1"),
    (call("give", kind="object"), None, "Size.SMALL"),
    (call("give", kind="odd") + call("\ud800"), "unknown_tool", "?"),
    (call("add", x=1), None, "2.0"),
]


def test_what_goes_wrong_is_told_to_the_policy_and_counted():
    environment = hermes([add, give], tool_timeout_s=1.0, max_result_chars=500)
    for step, (_, kind, message) in zip(answers(environment, *[text for text, *_ in TOLD]), TOLD, strict=True):
        assert told(step)[0].startswith(message) and step.messages[0]["role"] == "tool" and not step.over
        assert counted(step) == {"calls": len(step.messages), **({kind: 1} if kind else {})}
    with pytest.raises(SandboxError, match="no sandbox"):  # which is not the tool's fault
        answers(hermes([give]), call("give", kind="stop"))


def test_tools_that_wait_do_so_together_and_each_is_called_once():
    WAITED.clear()
    one, late = call("wait", seconds=0.5), call("wait", seconds=30)
    began = time.monotonic()
    steps = answers(hermes([wait, sleep], tool_timeout_s=5), *[one] * 15, one + one + call("sleep", seconds=0.5) + one, late)
    assert time.monotonic() - began < 10  # one by one it would be 14.5 s
    assert [told(step) for step in steps[:15]] == [["waited"]] * 15 and told(steps[15]) == ["waited", "waited", "slept", "waited"]
    assert told(steps[16]) == ["error: wait was not done after 5 s"] and counted(steps[16]) == {"calls": 1, "time": 1}
    assert sorted(WAITED) == [0.5] * 18 + [30]
    began = time.monotonic()
    assert all(told(step) == ["slept"] for step in answers(hermes([sleep]), *[call("sleep", seconds=0.5)] * 16))
    assert time.monotonic() - began < 6  # one by one it would be 8 s


def test_all_calls_of_a_message_stay_within_the_time_of_a_step():
    hang, fine = call("give", kind="hang"), call("give", kind="none")
    step, other = answers(hermes([give], tool_timeout_s=1.0), hang + hang + fine, fine, step_timeout_s=2)
    first, second, third = told(step)
    assert first == "error: give was not done after 1 s" and second.startswith("error: give was not done after 0.")
    assert third == "error: give was not called, since the calls before it took all the time of the step"
    assert counted(step) == {"calls": 3, "time": 3} and told(other) == ["(the tool returned nothing)"]


def test_what_a_tool_keeps_is_its_episodes():
    Notes.closed = 0
    tool = Notes("first")
    steps = answers(hermes([tool]), call("notes", text="a") + call("notes", text="b"), call("notes", text="c"), seeds=[1, 2])
    assert [json.loads(told(step)[-1]) for step in steps] == [["first 1", "a", "b"], ["first 2", "c"]]
    assert Notes.closed == 2 and not hasattr(tool, "kept")


def draw() -> float:
    """Draw a number."""
    return 0.5


def schema(tool):
    return describe_tool(tool)[1].schema["function"]


def test_a_schema_says_what_signature_and_docstring_say():
    x = {"type": "integer", "description": "The first one."}
    y = {"type": "number", "description": "The second one, which may be left out."}
    parameters = {"type": "object", "properties": {"x": x, "y": y}, "required": ["x"]}
    told = {"name": "add", "description": "Add two numbers.", "return": {"type": "number"}}
    assert schema(add) == {**told, "parameters": parameters}
    described = schema(Notes())
    assert described["name"] == "notes" and list(described["parameters"]["properties"]) == ["text"]
    assert schema(Notes().__call__.__func__.__get__(Notes()))["description"] == "Keep a text."


def tool_of(parameters, described):
    """A function with these parameters, and a docstring that describes arguments."""
    names = {"Literal": Literal, "Size": Size}
    lines = "".join(f"    {name}: {text}\n" for name, text in described.items())
    exec(f'def tool({parameters}):\n    """Do it.\n\n    Args:\n{lines}    """', names)
    return names["tool"]


UNDESCRIBED = [tool_of("x: int", {}), tool_of("x", {"x": "One."}), tool_of("*x: int", {"x": "All."})]
UNDESCRIBED += [tool_of("x: str", {"x": "What (choices: no, JSON)"}), torch.add, lambda: 1]


@pytest.mark.parametrize("tool", UNDESCRIBED)
def test_a_tool_that_cannot_be_described_is_refused_in_one_line(tool):
    with pytest.raises(ConfigError, match=r"cannot be described to a policy: .*; write a docstring that explains") as caught:
        ToolEnvironment([tool])
    assert "\n" not in str(caught.value)


def test_wrong_arguments_of_the_environment():
    for arguments, message in (
        ({"tools": []}, r"tools=\[\]; give a list"),
        ({"tools": ["absent.module.f"]}, "tools='absent.module.f': there is no module"),
        ({"tools": [Notes]}, "is not a function"),
        ({"tools": [add, add]}, "two tools are named 'add'"),
        ({"tools": [add], "tool_timeout_s": 0}, "tool_timeout_s=0; give"),
        ({"tools": [add, give], "call_format": PlainCalls("<(.)>")}, "there are 2 tools"),
    ):
        with pytest.raises(ConfigError, match=message):
            ToolEnvironment(**arguments)


KINDS = "a: str, b: list[int], c: dict[str, float], d: Literal['x', 1], e: Size, f: int | None, g: int | str, h: bool"
EVERY = tool_of(KINDS, dict.fromkeys("abcdefgh", "One."))
RIGHT = {"a": "", "b": [1], "c": {"k": 1}, "d": 1, "e": "l", "f": None, "g": "", "h": False}
WRONG = [("a", 1, "'string'"), ("a", [[]], "'string'"), ("b", [1, "2"], "'integer'"), ("b", {}, "'array'")]
WRONG += [
    ("c", {"k": "1"}, "'number'"),
    ("d", "y", "is not one of ['x', 1]"),
    ("d", True, "'string', 'integer'"),
    ("e", "S", "one of"),
]
WRONG += [("f", 1.5, "'integer'"), ("f", True, "'integer'"), ("g", None, "'integer', 'string'"), ("h", 1, "'boolean'")]


def test_arguments_are_checked_by_their_types():
    described = describe_tool(EVERY)[1]
    assert described.arguments(Call("tool", RIGHT)) == (RIGHT, "")
    assert described.schema["function"]["parameters"]["properties"]["f"]["nullable"], "as the chat template shows it"
    for name, value, kind in WRONG:
        _, said = described.arguments(Call("tool", {**RIGHT, name: value}))
        assert said.startswith(f"got wrong argument {name!r}: ") and kind in said, said
    deep = [[]]
    for _ in range(100_000):
        deep = [deep]
    assert "too deep" in described.arguments(Call("tool", {**RIGHT, "a": deep}))[1]


def test_a_plain_call_gives_the_only_argument():
    for tool, text, result in (
        (add, "[add: 2]", "3.0"),
        (add, '[add: {"x": 1, "y": 3}]', "4"),
        (add, "[add: 2.5]", "error: add got wrong argument 'x': 2.5 is not of type 'integer'"),
        (give, "[give: list]", '[1, "ä"]'),
        (draw, "[draw: 1]", "error: draw takes no arguments"),
        (EVERY, "[tool: 1]", "error: tool takes several arguments; give them as JSON: a, b, c"),
    ):
        for form in (None, PlainCalls(r"\[\w+: (.*)\]")):  # which has no names, and is for the only tool
            (step,) = answers(ToolEnvironment([tool], form), text)
            assert told(step)[0].startswith(result) and step.messages[0]["name"] == tool.__name__


def two(x: str, n: int = 1) -> str:
    """Repeat.

    Args:
        x: What.
        n: How often.
    """
    return x * n


def pwd() -> str:
    """Say where."""
    return "here"


def test_a_plain_call_that_was_meant_to_be_json_is_not_run_as_text():
    for text, result in (
        ('[two: {"x": "a", "n": 2}] [two: ab] [pwd: {}] [pwd:]', ["aa", "ab", "here", "here"]),
        ('[two: {"x": "a", "n": 2,}]', ["error: two takes several arguments; give them as JSON: x, n"]),
        ('[two: {"x": "a", "m": 2}]', ["error: two got wrong arguments: Additional properties are not allowed ('m' was"]),
        ('[two: ["a", 2]]', ["error: two takes several arguments; give them as JSON: x, n"]),
        ('[pwd: {"x": 1}]', ["error: pwd got wrong arguments: Additional properties are not allowed ('x' was"]),
    ):
        (step,) = answers(ToolEnvironment([two, pwd]), text)
        assert all(said.startswith(begin) for said, begin in zip(told(step), result, strict=True)), told(step)


def optional(x: str = "none") -> str:
    """Repeat.

    Args:
        x: What.
    """
    return f"<{x}>"


def keys(options: dict[str, int]) -> str:
    """List the keys.

    Args:
        options: Which have keys.
    """
    return f"<{','.join(options)}>"


BROKEN = 'error: optional got text that begins like JSON and is not; give text alone, or JSON such as {"x": ...}'


def test_a_plain_call_is_never_run_on_a_guess_at_json_that_is_broken():
    for text, results in (
        ("[optional: {}] [optional:] [optional: { }]", ["<none>"] * 3),
        ('[optional: {"x": "a]"}] [optional: a {1}]', ["<a]>", "<a {1}>"]),
        (r'[optional: {"x": "C:\\new"}] [optional: C:\new]', ["<C:\\new>"] * 2),
        ('[optional: {"x": "a",}] [optional: {x: 1}]', [BROKEN] * 2),
        ("[optional: {'x': 'a'}] [optional: {\"x\": \"a\"} b]", [BROKEN] * 2),
        ('[optional: "x": "a"] [optional: ```json\n{"x": "a"}\n```] [optional: {"x": "a]"]', [BROKEN] * 3),
        ('[optional: {"y": "a"}]', ["error: optional got wrong arguments: Additional properties are not allowed ('y' was"]),
        ('[two: "x": "a"] [two: {"x": "a", n: 2}]', ["error: two takes several arguments; give them as JSON: x, n"] * 2),
        ("[two: {}]", ["error: two got wrong arguments: 'x' is a required property"]),
        ('[keys: {"k": 1}] [keys: {"options": {"k": 1}}] [keys: {}]', ["<k>", "<k>", "<>"]),
        ('[keys: {"k": 1,}]', ["error: keys got text that begins like JSON and is not"]),
        ("[pwd: {x}]", ["error: pwd takes no arguments"]),
    ):
        (step,) = answers(ToolEnvironment([two, pwd, optional, keys], PlainCalls()), text)
        assert not step.over and len(told(step)) == len(results)
        assert all(said.startswith(begin) for said, begin in zip(told(step), results, strict=True)), told(step)


def test_a_plain_call_of_a_tool_with_dots_and_dashes_in_its_name_does_not_end_the_episode():
    class Named(Notes):
        name = "my-server.keep"

    (step,) = answers(ToolEnvironment([Named()], PlainCalls()), "[my-server.keep: a] [my-server.lose: a]")
    assert json.loads(told(step)[0])[-1] == "a" and "there is no tool 'my-server.lose'" in told(step)[1]


def test_only_a_thought_that_a_message_begins_with_has_no_calls():
    thinking, within = f"<think>\n{call('add', x=1)}", call("two", x="a </think> b")
    for text, result in (
        (thinking, None),
        (f"{thinking}\n</think>\n{call('add', x=2)}", ["3.0"]),
        (f"{within}{call('add', x=2)}", ["a </think> b", "3.0"]),
    ):
        message = {"role": "assistant", "content": "", "raw": text}
        environment = hermes([add, two])
        step = asyncio.run(environment.step(message))
        assert step.over if result is None else told(step) == result


@dataclasses.dataclass
class Block:
    type: str
    text: str = ""


class Found:  # as a model of pydantic
    def __init__(self, content: list[Any]) -> None:
        self.content = content

    def model_dump(self):
        return {"content": self.content}


def test_results_are_written_as_observations_are():
    blocks = [Block("text", "one "), {"type": "text", "text": "two"}]
    for value, text in (
        (np.arange(3), "[0, 1, 2]"),
        (Found(content=[1]), '{"content": [1]}'),
        (Found(content=[Block("text", "MCP's")]), "MCP's"),
        (blocks, "one two"),
        ([{"type": "apple", "text": "red"}], '[{"type": "apple", "text": "red"}]'),
        ({1}, "{1}"),
    ):
        assert as_text(value) == text
    with pytest.raises(ConfigError, match="a block of type 'image'; only texts"):
        as_text([*blocks, {"type": "image", "data": "..."}])


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def increase(self) -> int:
        """Count."""
        self.count += 1
        return self.count

    def double(self) -> int:
        """Double the count."""
        self.count *= 2
        return self.count


def test_methods_of_one_object_share_a_copy_of_it_in_each_episode():
    counter = Counter()
    twice = call("increase") + call("double")
    steps = answers(hermes([counter.increase, counter.double]), twice, twice)
    assert [told(step) for step in steps] == [["1", "2"]] * 2 and counter.count == 0


def test_the_chat_template_decides_about_form_role_and_description():
    """Roles and forms of further templates are in `episodes/test_turns`."""
    environments = []
    for template in ((TEMPLATES / "qwen3.jinja").read_text(), (TEMPLATES / "gemma.jinja").read_text()):
        environment = ToolEnvironment([add])
        environment.prepare(template)
        environments.append(environment.new())
    qwen, gemma = environments
    assert isinstance(qwen.call_format, HermesCalls) and isinstance(gemma.call_format, PlainCalls)
    assert (len(qwen.tools()), qwen.start(CHAT, 1), gemma.tools()) == (1, (), [])
    (message,) = gemma.start(CHAT, 1)
    assert message["role"] == "system" and "add: Add two numbers." in message["content"] and "[add: ...]" in message["content"]
    assert gemma.start(Prompt(text="Add."), 1) == ()
    assert asyncio.run(gemma.step({"role": "assistant", "content": "[add: 1]"})).messages[0]["role"] == "user"


def test_a_config_names_functions_by_their_module():
    config = ToolEnvironment([add, Notes("a")], HermesCalls()).to_config()
    assert config["class_path"] == "hybrid_lightning.environments.ToolEnvironment"
    name, notes = config["init_args"]["tools"]
    assert name == f"{__name__}.add" and notes["init_args"] == {"first": "a"}
    assert ToolEnvironment([name]).tools()[0]["function"]["name"] == "add"
