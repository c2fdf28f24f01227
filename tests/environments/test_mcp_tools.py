"""Tools of MCP servers: a small one that is started by its command, and one of the official package over HTTP."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mcp_server
import pytest
from cli_runs import done, run, write_folder
from environments_in_turns import EnvironmentsInTurns
from stopped_runs import points, run_of
from test_calls import TEMPLATES

from hybrid_lightning.environments import EpisodeLimits, Failure, McpTools, ToolEnvironment, calculator, running
from hybrid_lightning.errors import ConfigError, EpisodeError
from hybrid_lightning.types import Prompt

pytest.importorskip("mcp", reason="needs mcp: pip install 'hybrid-lightning[mcp]'")
SERVER = Path(__file__).with_name("mcp_server.py")
COMMAND = shlex.join([sys.executable, "-S", str(SERVER)])
TEMPLATE = (TEMPLATES / "qwen2_5.jinja").read_text()
PROMPT = Prompt(messages=({"role": "user", "content": "Go."},))
KEY = "sk-very-secret-1234567890"


def call(name, **arguments):
    return {"role": "assistant", "content": f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"}


@pytest.fixture
def play():
    """Begin episodes with tools; returns them, and what asks some of them for an answer."""
    begun = []

    def run(*tools, count=3, **options):
        environment = ToolEnvironment(list(tools), **options)
        environment.prepare(TEMPLATE)
        episodes = EnvironmentsInTurns(environment, EpisodeLimits(max_failed_share=0.5))
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
    environment, step = play(server, calculator, tool_timeout_s=3)
    schemas = {tool["function"]["name"]: tool["function"] for tool in environment.tools()}
    assert list(schemas) == ["calculator", "add", "write", "do"], "of both pages"
    assert schemas["add"]["description"] == "Add two whole numbers." and schemas["add"]["parameters"]["required"] == ["x", "y"]
    answers = step({0: call("add", x=2, y=3), 1: call("add", x="2"), 2: call("calculator", expression="2*3")})
    assert texts(answers)[::2] == ["5", "6"] and answers[1].counts["failed_calls/arguments"] == 1
    assert texts(step({0: call("write", text="a")})) + texts(step({1: call("write", text="b")})) == ["a", "a b"], "all share it"
    answers = step({0: call("do", text="fly"), 1: call("do", text="hang"), 2: call("do", text="key")})
    assert texts(answers) == ["error: do raised McpToolError: cannot fly", "error: do was not done after 3 s", "secret"]
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
    with pytest.raises(ConfigError, match=rf"McpTools: the MCP server {url} cannot be reached: .*; correct command, url or"):
        McpTools(url=url).tools()


class Keyed(BaseHTTPRequestHandler):
    """Handler of a server with a key. `refusals` are the statuses of its next answers."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = 200 if self.headers["Authorization"] == f"Bearer {KEY}" else 401
        status = self.server.refusals.pop(0) if self.server.refusals else status
        body = f"bad {self.headers['Authorization']}"
        if status == 200 and "id" in request:
            try:
                body = {"result": mcp_server.answer(request["method"], request.get("params") or {})}
            except AssertionError as error:
                body = {"error": {"code": -32601, "message": str(error)}}
            body = json.dumps({"jsonrpc": "2.0", "id": request["id"], **body})
        self.send_response(status if "id" in request else 202)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self):
        self.send_error(405)

    def log_message(self, *args):
        pass


@pytest.fixture
def keyed():
    with ThreadingHTTPServer(("127.0.0.1", 0), Keyed) as server:
        server.refusals, server.url = [], f"http://127.0.0.1:{server.server_port}/mcp"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_server_gets_its_key_from_the_environment_and_one_that_refuses_costs_the_episode(play, keyed, monkeypatch, caplog):
    monkeypatch.setenv("MCP_TEST_KEY", f"Bearer {KEY}")
    caplog.set_level("DEBUG")
    environment, step = play(server := McpTools(url=keyed.url, headers={"Authorization": "MCP_TEST_KEY"}))
    assert texts(step({0: call("add", x=1, y=1)})) == ["2"]
    keyed.refusals += [404]  # which the client calls an error of the session: another server at this address, or a restart
    assert texts(step({0: call("add", x=1, y=2)})) == ["3"], "by a new connection"
    keyed.refusals += [503] * 9
    answers = step({1: call("add", x=1, y=3)})
    assert isinstance(answers[1], Failure) and re.search(r"MCP server \S+ cannot be reached.*503", answers[1].reason)
    keyed.refusals.clear()
    monkeypatch.setenv("MCP_TEST_KEY", f"Bearer {KEY}-old")
    with pytest.raises(ConfigError, match=r"cannot be reached: .*status 401, which a key in headers may fix") as refused:
        McpTools(**server.to_config()["init_args"]).tools()
    assert KEY not in str(refused.value) + caplog.text + json.dumps(environment.to_config())


def test_a_server_is_there_again_after_another_tool_has_blocked_the_event_loop(play, monkeypatch):
    monkeypatch.setattr(running, "BLOCKED_S", 0.3)
    free = threading.Event()

    async def block() -> str:
        """Block the event loop."""
        return str(free.wait(60))

    _, step = play(server := McpTools(COMMAND), block)
    assert texts(step({0: call("add", x=1, y=1)})) == ["2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.__self__.running.limits, "step_timeout_s", 0.3)
        assert "has blocked it" in step({1: call("block")})[1].reason
    assert not server.is_connected and texts(step({0: call("add", x=1, y=2)})) == ["3"]
    free.set()


PARTS = """
from hybrid_lightning.environments import CallFormat
from hybrid_lightning.environments.calls import Call

class Lengths(CallFormat):
    def parse(self, text, tools=()):
        return [Call("add", {"x": len(text), "y": 1})] if len(text) % 3 else []

    def describe(self, tools):
        return "Call them."
"""


@pytest.fixture
def folder(tmp_path):
    yield from write_folder(tmp_path)


@pytest.mark.long
def test_a_run_stopped_in_a_call_resumes_bit_exactly(folder, monkeypatch):
    (folder / "calls.py").write_text(PARTS)
    server = {"class_path": "McpTools", "init_args": {"command": COMMAND}}
    environment = {"class_path": "ToolEnvironment", "init_args": {"tools": [server], "call_format": "calls.Lengths"}}
    model = {"environment": environment, "turn_template": "{content}", "episodes": {"max_turns": 3, "max_tokens": 30}}
    model["sampler"] = {"stop": list("02468bdfhjlnprtvxz")}  # or hardly a message would end
    (folder / "mcp.yaml").write_text(json.dumps({"model": model}))
    fit = ["fit", "--config=t.yaml", "--config=mcp.yaml", "--adapter.scorer=Random"]
    fit += ["--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0", "--checkpoint.monitor=null"]
    calls, plain = [], McpTools.call

    async def stopped_within(self, name, arguments):
        calls.append(name)
        if len(calls) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
            name, arguments = "do", {"text": "hang"}
        return await plain(self, name, arguments)

    monkeypatch.setattr(McpTools, "call", stopped_within)
    stop = -1
    whole = done(folder, *fit)
    stop = len(calls) * 7 // 4
    stopped = run(folder, *fit)
    assert stopped.code == 143, stopped.err[-2000:]
    resumed = done(folder, *shlex.split(re.findall(r"hybrid_lightning (fit --config .+)", stopped.out)[-1]))
    curves = points(run_of(whole, folder))
    assert points(run_of(stopped, folder), run_of(resumed, folder)) == curves and len(calls) > 20
    assert min(value for (name, _), value in curves.items() if name == "episodes/calls") > 0


def test_what_cannot_work_is_said():
    with pytest.raises(ConfigError, match="Authorization is not the name") as refused:
        McpTools(url="http://x/mcp", headers={"Authorization": f"Bearer {KEY}"})
    assert KEY not in str(refused.value)
    with pytest.raises(ConfigError, match="give one of the two"):
        McpTools()
    with pytest.raises(ConfigError, match="the environment variable MCP_NOT_SET is not set"):
        McpTools("server", env=["MCP_NOT_SET"]).tools()
    with pytest.raises(ConfigError, match=r"the MCP server no-such-server-here cannot be reached: .*No such file"):
        McpTools("no-such-server-here").tools()
