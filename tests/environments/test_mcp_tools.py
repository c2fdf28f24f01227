"""Tools of MCP servers: a small one that is started by its command, and one of the official package over HTTP."""

import json
import shlex
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from test_calls import TEMPLATES

from hybrid_lightning.environments import EpisodeLimits, Failure, McpTools, RunningEpisodes, ToolEnvironment, calculator
from hybrid_lightning.errors import ConfigError, EpisodeError
from hybrid_lightning.types import Prompt

pytest.importorskip("mcp", reason="needs mcp: pip install 'hybrid-lightning[mcp]'")
SERVER = Path(__file__).with_name("mcp_server.py")
COMMAND = shlex.join([sys.executable, "-S", str(SERVER)])
TEMPLATE = (TEMPLATES / "qwen2_5.jinja").read_text()
PROMPT = Prompt(messages=({"role": "user", "content": "Go."},))


def call(name, **arguments):
    return {"role": "assistant", "content": f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"}


@pytest.fixture
def play():
    """Begin episodes with tools; returns them, and what asks some of them for an answer."""
    begun = []

    def run(*tools, count=3, **options):
        environment = ToolEnvironment(list(tools), **options)
        environment.prepare(TEMPLATE)
        episodes = RunningEpisodes(environment, EpisodeLimits(max_failed_share=0.5))
        begun.append((episodes, tools))
        episodes.start([PROMPT] * count, [0] * count)
        return environment, episodes.step

    yield run
    for episodes, tools in begun:
        episodes.close()
        for tool in tools:
            if isinstance(tool, McpTools):
                tool.disconnect()


def texts(answers):
    return [answers[number].messages[0]["content"] for number in sorted(answers)]


def test_the_tools_of_a_server_stand_beside_others_and_their_errors_are_told(play, monkeypatch):
    monkeypatch.setenv("MCP_TEST_KEY", "secret")
    server = McpTools(COMMAND, env=["MCP_TEST_KEY"])
    environment, step = play(server, calculator, tool_timeout_s=1.0)
    schemas = {tool["function"]["name"]: tool["function"] for tool in environment.tools()}
    assert list(schemas) == ["calculator", "add", "write", "do"], "of both pages"
    assert schemas["add"]["description"] == "Add two whole numbers." and schemas["add"]["parameters"]["required"] == ["x", "y"]
    answers = step({0: call("add", x=2, y=3), 1: call("add", x="2"), 2: call("calculator", expression="2*3")})
    assert texts(answers)[::2] == ["5", "6"] and answers[1].counts["failed_calls/arguments"] == 1
    assert texts(step({0: call("write", text="a")})) + texts(step({1: call("write", text="b")})) == ["a", "a b"], "all share it"
    answers = step({0: call("do", text="fly"), 1: call("do", text="hang"), 2: call("do", text="key")})
    assert texts(answers) == ["error: do raised McpToolError: cannot fly", "error: do was not done after 1 s", "secret"]
    assert answers[0].counts["failed_calls/raised"] == answers[1].counts["failed_calls/time"] == 1
    assert texts(step({1: call("add", x=1, y=1)})) == ["2"], "after a call that was given up"
    assert "secret" not in json.dumps(environment.to_config())


def test_a_server_that_dies_costs_the_episode_and_the_others_go_on(play):
    _, step = play(McpTools(COMMAND))
    step({number: call("add", x=1, y=1) for number in range(3)})
    answers = step({0: call("do", text="die")})
    assert isinstance(answers[0], Failure) and answers[0].reason.startswith(
        "ToolEnvironment.step raised ServerLostError: the MCP"
    )
    assert "mcp_server.py has ended: no more memory" in answers[0].reason, "what it said at last"
    assert texts(step({1: call("add", x=1, y=2)})) == ["3"], "a new one"
    with pytest.raises(EpisodeError, match=r"the environment failed in 2 of 3 episodes.* has ended: no more memory"):
        step({1: call("do", text="die")})


def test_an_episode_may_have_a_server_of_its_own(play):
    server = McpTools(COMMAND, per_episode=True)
    _, step = play(server, count=2)
    assert not server.is_connected, "it was asked for its tools alone"
    assert texts(step({0: call("write", text="a"), 1: call("write", text="b")})) == ["a", "b"]
    assert texts(step({0: call("write", text="c")})) == ["a c"]
    answers = step({0: call("do", text="die"), 1: call("write", text="d")})
    assert isinstance(answers[0], Failure) and texts({1: answers[1]}) == ["b d"]


def test_a_server_by_its_address(play):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/mcp"
    with subprocess.Popen([sys.executable, str(SERVER), str(port)]) as running:
        try:
            while running.poll() is None:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            _, step = play(McpTools(url=url))
            answers = step({0: call("do", text="key"), 1: call("do", text="fly")})
            assert texts(answers)[0] == "None" and texts(answers)[1].startswith("error: do raised McpToolError: ")
            assert isinstance(step({0: call("do", text="die")})[0], Failure)
        finally:
            running.kill()
    with pytest.raises(ConfigError, match=rf"McpTools: the MCP server {url} cannot be reached: .*; correct command or url"):
        McpTools(url=url).tools()


def test_what_cannot_work_is_said():
    with pytest.raises(ConfigError, match="give one of the two"):
        McpTools()
    with pytest.raises(ConfigError, match="the environment variable MCP_NOT_SET of env is not set"):
        McpTools("server", env=["MCP_NOT_SET"]).tools()
    with pytest.raises(ConfigError, match=r"the MCP server no-such-server-here cannot be reached: .*No such file"):
        McpTools("no-such-server-here").tools()
