"""`McpTools`: the tools of a Model Context Protocol server (https://modelcontextprotocol.io), through its official client.

    the server returns an error                       the policy gets it, as from any tool that raises
    the server does not answer in time                the policy gets an error, and the call is cancelled
    the server ends, cannot be reached, or rejects    the episode starts again with a new connection, and is left out after three
      the request by an HTTP status (401, 404, 503)     attempts

The client must be opened and closed in the same task, so each connection is a task on the event loop that runs all tool calls.
"""

import asyncio
import atexit
import os
import re
import shlex
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

from hybrid_lightning.environments.tool import Tool, ToolSchema
from hybrid_lightning.errors import ConfigError, one_line
from hybrid_lightning.shared.configurable import Configurable
from hybrid_lightning.shared.user_calls import is_shared, run_async

_CONNECT_S = 60.0  # time for a server to start, which may include its download


class ServerLostError(Exception):
    """An MCP server that has ended, cannot be reached, or does not start."""


class McpToolError(Exception):
    """The error that an MCP server returned for a call, as text."""


class McpTools(Configurable):
    """All tools of an MCP server, as an entry of `ToolEnvironment.tools`.

    One connection serves all episodes of a process, so episodes share any state that the server keeps. Set `per_episode` if
    answers depend on earlier calls, for example if the server writes files.

    Args:
        command: Starts a server that communicates over standard input and output, such as `uvx mcp-server-fetch`; runs without a
            shell.
        url: Address of a running server, over streamable HTTP, such as `http://localhost:8000/mcp`.
        env: Names of environment variables to pass on to `command`, besides PATH, HOME and the like. Keys in variables stay out
            of configs and checkpoints.
        headers: HTTP headers for `url`, each with the name of the environment variable that holds its value, such as
            `{Authorization: MCP_AUTHORIZATION}` for a variable with `Bearer KEY`.
        per_episode: Whether each episode has its own connection and, with `command`, its own server.

    Raises:
        ConfigError: If not exactly one of `command` and `url` is given, or a header does not name a variable.
    """

    def __init__(
        self,
        command: str | None = None,
        url: str | None = None,
        env: list[str] | None = None,
        headers: dict[str, str] | None = None,
        per_episode: bool = False,
    ) -> None:
        if (command is None) == (url is None) or not (command or url or "").strip():
            raise ConfigError(f"McpTools: command={command!r} and url={url!r}; give one of the two")
        self.command, self.url, self.env, self.per_episode = command, url, env or [], per_episode
        self.headers = headers or {}
        for header, variable in self.headers.items():
            if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):  # not repeated: it may be the key
                raise ConfigError(
                    f"McpTools: headers.{header} is not the name of an environment variable; give one that holds the header's "
                    "value, not the value"
                )
        self._listed: list[dict[str, Any]] | None = None  # JSON schemas of the tools
        self._connection: _Connection | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its arguments: another process opens its own connection."""
        return partial(type(self), **self._init_args), ()

    def tools(self) -> "list[_McpTool]":
        """The tools of the server, for one episode. They are listed once.

        Raises:
            ConfigError: If the client is not installed, a variable is not set, or the server cannot be reached or has no tools.
        """
        if self._listed is None:
            if find_spec("mcp") is None:
                raise ConfigError("McpTools needs the package mcp; pip install 'hybrid-lightning[mcp]'")
            missing = [name for name in (*self.env, *self.headers.values()) if name not in os.environ]
            if missing:
                raise ConfigError(f"McpTools: the environment variable {missing[0]} is not set; set it, or leave it out")
            try:
                self._listed = run_async(self._list())
            except (ServerLostError, McpToolError) as error:
                raise ConfigError(f"McpTools: {error}; correct command, url or headers, and test the server by itself") from error
            if not self._listed:
                raise ConfigError(f"McpTools: {self.command or self.url} has no tools; use another server")
        server = type(self)(**self._init_args) if self.per_episode else self
        return [_McpTool(server, schema) for schema in self._listed]

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection that is not known to be lost."""
        return self._connection is not None and not self._connection.is_lost

    def disconnect(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None and self.is_connected:
            run_async(self._connection.close())

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Call a tool; McpToolError if the server returns an error, ServerLostError if the server is gone."""
        if self.per_episode and self._connection is not None and self._connection.is_lost:  # a new server would lose its state
            raise self._connection.lost("has ended")
        result = await (await self._connected()).request(lambda client: client.call_tool(name, arguments))
        text = "\n".join(map(_text_of, result.content))
        if result.is_error:
            raise McpToolError(text)
        return text

    async def _connected(self) -> "_Connection":
        if self._connection is None or self._connection.is_lost:
            self._connection = _Connection(self.command, self.url, self.env, self.headers)
            if not self.per_episode:
                atexit.register(self.disconnect)
        await self._connection.opened()
        return self._connection

    async def _list(self) -> list[dict[str, Any]]:
        connection, listed, cursor = await self._connected(), [], None
        while True:
            page = await connection.request(lambda client, cursor=cursor: client.list_tools(cursor=cursor))
            for tool in page.tools:
                parameters = {"type": "object", "properties": {}, **tool.input_schema}
                function = {"name": tool.name, "description": tool.description or "", "parameters": parameters}
                listed.append({"type": "function", "function": function})
            cursor = page.next_cursor
            if cursor is None:
                break
        if self.per_episode:
            await connection.close()
        return listed


class _McpTool(Tool):
    name = ""

    def __init__(self, server: McpTools, schema: dict[str, Any]) -> None:
        self._server, self.schema, self.name = server, ToolSchema(schema), schema["function"]["name"]

    def start(self, seed: int) -> None:
        if not self._server.is_connected:
            run_async(self._server._connected())

    async def __call__(self, **arguments: Any) -> str:  # type: ignore[override]
        return await self._server.call(self.name, arguments)

    def close(self) -> None:
        if self._server.per_episode:
            self._server.disconnect()


class _Connection:
    """A session with a server, made and used on one event loop; methods raise ServerLostError if the server is gone."""

    def __init__(self, command: str | None, url: str | None, env: list[str], headers: dict[str, str]) -> None:
        self._command, self._url = command, url
        self._refusal = self._last_line = ""  # the HTTP status of a rejected request, and the end of the server's error output
        self._env = {name: os.environ[name] for name in env}
        self._headers = {header: os.environ[name].strip() for header, name in headers.items()}
        self._client: Any = None
        self._loop, self._ready, self._end = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        self._task = asyncio.create_task(self._hold())
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # else asyncio prints the exception

    @property
    def is_lost(self) -> bool:
        return self._task.done() or self._end.is_set() or not is_shared(self._loop)

    async def opened(self) -> None:
        ready = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait({ready, self._task}, timeout=_CONNECT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if not self._ready.is_set():
            late = "" if self._task.done() else f" within {_CONNECT_S:g} s"
            await self.close()
            raise self.lost(f"cannot be reached{late}")

    async def request(self, question: Callable[..., Awaitable[Any]]) -> Any:
        from anyio import BrokenResourceError, ClosedResourceError
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED

        work = asyncio.ensure_future(question(self._client))
        try:
            await asyncio.wait({work, self._task}, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and not work.cancelled():
                return work.result()
        except MCPError as error:
            if error.error.code != CONNECTION_CLOSED and not self._refusal:
                raise McpToolError(error.error.message) from error
        except (BrokenResourceError, ClosedResourceError):
            pass
        finally:
            work.cancel()
        await self.close()
        raise self.lost("refuses" if self._refusal else "has ended")

    async def close(self) -> None:
        self._end.set()
        if not self._ready.is_set():
            self._task.cancel()
        await asyncio.wait({self._task})

    async def _hold(self) -> None:
        from mcp import Client, StdioServerParameters
        from mcp.client.stdio import stdio_client

        with tempfile.TemporaryFile("w+") as errors:  # the server's error output, which may be long
            if self._command is not None:
                command, *arguments = shlex.split(self._command)
                parameters = StdioServerParameters(command=command, args=arguments, env=self._env)
                server: Any = stdio_client(parameters, errlog=errors)
            else:
                server = self._over_http()
            try:
                async with Client(server) as self._client:
                    self._refusal = ""  # from a request about the protocol's version
                    self._ready.set()
                    await self._end.wait()
            finally:
                errors.seek(0)
                self._last_line = errors.read().strip().rpartition("\n")[2]

    @asynccontextmanager
    async def _over_http(self) -> AsyncIterator[Any]:
        from mcp.client.streamable_http import create_mcp_http_client, streamable_http_client

        async def note(response: Any) -> None:  # the client passes on neither status nor reason
            if response.status_code > 400 and response.request.method == "POST":
                remedy = ", which a key in headers may fix" if response.status_code in (401, 403) else ""
                self._refusal = f"status {response.status_code}{remedy}"

        assert self._url is not None, "or there is a command"
        async with create_mcp_http_client(self._headers) as client:
            client.event_hooks = {"response": [note]}
            async with streamable_http_client(self._url, http_client=client) as streams:
                yield streams

    def lost(self, how: str) -> ServerLostError:
        error = None if self._task.cancelled() else self._task.exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        known = filter(None, ["" if error is None else one_line(error), self._refusal, self._last_line])
        message = ": ".join([f"the MCP server {self._command or self._url} {how}", *known])
        for value in (*self._env.values(), *self._headers.values()):  # some servers quote the key
            for secret in (value, value.rpartition(" ")[2]):
                message = message.replace(secret, "***") if len(secret) > 5 else message
        return ServerLostError(message[:1000])


def _text_of(block: Any) -> str:
    """The text of a block in an answer; for another kind of block, a note about it."""
    text = getattr(block, "text", None) or getattr(getattr(block, "resource", None), "text", None)
    return text if isinstance(text, str) else "" if block.type == "text" else f"[{block.type}, which cannot be shown]"
