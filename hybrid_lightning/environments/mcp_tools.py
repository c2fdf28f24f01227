"""`McpTools`: the tools of a server of the Model Context Protocol (https://modelcontextprotocol.io), by its official client.

A server runs beside the policy (`command`, which talks over its standard input and output) or elsewhere (`url`, streamable HTTP).
It is asked once for its tools; their schemas are what the policy is shown, and by what its arguments are checked.

    the server answers an error                 the policy is told, as of any tool that raises
    it does not answer in time                  the policy is told; the call is cancelled at the server
    it ends, or cannot be reached               nobody's fault but its own: the episode is begun again, at most twice, with a new
                                                connection, and then left out (see `RunningEpisodes`)

A connection is held by one task of the event loop on which all calls of tools run: the client has to be opened and closed in
one task.
"""

import asyncio
import atexit
import os
import shlex
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.util import find_spec
from typing import IO, Any

from hybrid_lightning.configurable import Configurable
from hybrid_lightning.environments.tool import Tool, ToolSchema
from hybrid_lightning.errors import ConfigError, one_line
from hybrid_lightning.user_calls import run_async

_CONNECT_S = 60.0  # for which a server may start, such as one that is downloaded first


class ServerLostError(Exception):
    """An MCP server that has ended, cannot be reached, or does not begin."""


class McpTools(Configurable):
    """All tools of an MCP server, as an entry of `ToolEnvironment.tools`.

    One connection serves all episodes of a process, so that they share whatever state the server keeps. A server whose answers
    depend on earlier calls, such as one that writes files, wants `per_episode`.

    Args:
        command: The command that starts the server, such as `uvx mcp-server-fetch`. It is not run by a shell.
        url: The address of a server that runs, such as `http://localhost:8000/mcp`.
        env: Names of environment variables that `command` gets from this process, besides PATH, HOME and the like: so keys stay
            out of configs and checkpoints.
        per_episode: Whether each episode has a connection of its own, and so with `command` a server of its own, which costs
            starting it.

    Raises:
        ConfigError: If not exactly one of `command` and `url` is given.
    """

    def __init__(
        self, command: str | None = None, url: str | None = None, env: list[str] | None = None, per_episode: bool = False
    ) -> None:
        if (command is None) == (url is None) or not (command or url or "").strip():
            raise ConfigError(f"McpTools: command={command!r} and url={url!r}; give one of the two")
        self.command, self.url, self.env, self.per_episode = command, url, env or [], per_episode
        self._listed: list[tuple[str, dict[str, Any]]] | None = None  # names and schemas
        self._connection: _Connection | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its arguments: another process has a connection of its own."""
        return partial(type(self), **self._init_args), ()

    def tools(self) -> "list[McpTool]":
        """The tools of the server, for one episode. It is asked for them once.

        Raises:
            ConfigError: If the client is not installed, a variable is not set, or the server cannot be reached or has no tools.
        """
        if self._listed is None:
            if find_spec("mcp") is None:
                raise ConfigError("McpTools needs the package mcp; pip install 'hybrid-lightning[mcp]'")
            missing = [name for name in self.env if name not in os.environ]
            if missing:
                raise ConfigError(f"McpTools: the environment variable {missing[0]} of env is not set; set it, or take it out")
            try:
                self._listed = run_async(self._list())
            except (ServerLostError, McpToolError) as error:
                raise ConfigError(f"McpTools: {error}; correct command or url, and try it by itself") from error
            if not self._listed:
                raise ConfigError(f"McpTools: {self.command or self.url} has no tools; take another server")
        server = type(self)(**self._init_args) if self.per_episode else self
        return [McpTool(server, name, schema) for name, schema in self._listed]

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, and as far as is known the server is there."""
        return self._connection is not None and not self._connection.is_lost

    def connect(self) -> None:
        """Open the connection, if there is none; called by a thread.

        Raises:
            ServerLostError: If the server does not begin.
        """
        if not self.is_connected:
            run_async(self._connected())

    def disconnect(self) -> None:
        """Close the connection, if there is one; called by a thread."""
        if self._connection is not None and self.is_connected:
            run_async(self._connection.close())

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Call a tool; awaited on the event loop of `user_calls`.

        Raises:
            McpToolError: If the server answers an error.
            ServerLostError: If the server is gone. A server of an episode is not begun anew within it, since its state is lost.
        """
        if self.per_episode and not self.is_connected:
            raise ServerLostError(f"the MCP server {self.command or self.url} has ended")
        connection = await self._connected()
        result = await connection.ask(lambda client: client.call_tool(name, arguments))
        text = "\n".join(_text_of(block) for block in result.content)
        if result.is_error:
            raise McpToolError(text)
        return text

    async def _connected(self) -> "_Connection":
        if self._connection is None or self._connection.is_lost:
            self._connection = _Connection(self.command, self.url, self.env)
            if not self.per_episode:
                atexit.register(self.disconnect)
        await self._connection.opened()
        return self._connection

    async def _list(self) -> list[tuple[str, dict[str, Any]]]:
        connection = await self._connected()
        listed: list[tuple[str, dict[str, Any]]] = []
        cursor: str | None = None
        while True:
            page = await connection.ask(lambda client, cursor=cursor: client.list_tools(cursor=cursor))
            for tool in page.tools:
                parameters = {"type": "object", "properties": {}, **tool.input_schema}
                function = {"name": tool.name, "description": tool.description or "", "parameters": parameters}
                listed.append((tool.name, {"type": "function", "function": function}))
            cursor = page.next_cursor
            if cursor is None:
                break
        if self.per_episode:
            await connection.close()
        return listed


class McpToolError(Exception):
    """What an MCP server says of a call that went wrong."""


class McpTool(Tool):
    """A tool of an MCP server.

    Args:
        server: The server.
        name: Name of the tool.
        schema: JSON schema of the tool, as chat templates take it.
    """

    def __init__(self, server: McpTools, name: str, schema: dict[str, Any]) -> None:
        self._server, self._name, self.schema = server, name, ToolSchema(schema)

    @property
    def name(self) -> str:
        """Name by which the policy and the server call it."""
        return self._name

    def start(self, seed: int) -> None:
        """Begin an episode."""
        self._server.connect()

    async def __call__(self, **arguments: Any) -> str:  # type: ignore[override]
        """Call the tool at the server."""
        return await self._server.call(self.name, arguments)

    def close(self) -> None:
        """End the server, if it is the episode's own."""
        if self._server.per_episode:
            self._server.disconnect()


class _Connection:
    """A session with a server, made and used on one event loop."""

    def __init__(self, command: str | None, url: str | None, env: list[str]) -> None:
        self._what, self._url, self._env = command or url, url, env
        self._command = shlex.split(command or "")
        self._client, self._said = None, ""
        self._loop, self._ready, self._end = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        self._task = asyncio.create_task(self._hold())
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # or asyncio prints it where nobody asks

    @property
    def is_lost(self) -> bool:
        """Whether it has ended, or the loop that it belongs to."""
        return self._task.done() or self._end.is_set() or not self._loop.is_running()

    async def opened(self) -> None:
        """Wait until it can be used; ServerLostError if it cannot."""
        ready = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait({ready, self._task}, timeout=_CONNECT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if not self._ready.is_set():
            why = self._why() if self._task.done() else f": it has not begun after {_CONNECT_S:g} s"
            await self.close()
            raise ServerLostError(f"the MCP server {self._what} cannot be reached{why}")

    async def ask(self, question: Callable[..., Awaitable[Any]]) -> Any:
        """What the server answers; ServerLostError if it ends meanwhile, McpToolError if it refuses."""
        from anyio import BrokenResourceError, ClosedResourceError
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED

        work = asyncio.ensure_future(question(self._client))
        try:
            await asyncio.wait({work, self._task}, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and not work.cancelled():
                return work.result()
        except MCPError as error:
            if error.error.code != CONNECTION_CLOSED:
                raise McpToolError(error.error.message) from error
        except (BrokenResourceError, ClosedResourceError):
            pass
        finally:
            work.cancel()
        await self.close()
        raise ServerLostError(f"the MCP server {self._what} has ended{self._why()}")

    async def close(self) -> None:
        """End it, and the server if it was started here."""
        self._end.set()
        if not self._ready.is_set():
            self._task.cancel()
        await asyncio.wait({self._task})

    async def _hold(self) -> None:
        from mcp import Client, StdioServerParameters
        from mcp.client.stdio import stdio_client

        with tempfile.TemporaryFile("w+") as self._errors:  # its error output, of which it may write much in a run
            server: Any = self._url
            if self._url is None:
                env = {name: os.environ[name] for name in self._env}
                parameters = StdioServerParameters(command=self._command[0], args=self._command[1:], env=env)
                server = stdio_client(parameters, errlog=self._errors)
            try:
                async with Client(server) as self._client:
                    self._ready.set()
                    await self._end.wait()
            finally:
                self._said = _last_line(self._errors)

    def _why(self) -> str:
        """What is known of the end of it."""
        error = None if self._task.cancelled() else self._task.exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        known = [one_line(error)] if error is not None else []
        return "".join(f": {text}" for text in [*known, *filter(None, [self._said])])


def _last_line(file: IO[str]) -> str:
    file.seek(0)
    lines = file.read().split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _text_of(block: Any) -> str:
    """The text of a block of an answer; of another kind that it is there."""
    text = getattr(block, "text", None) or getattr(getattr(block, "resource", None), "text", None)
    return text if isinstance(text, str) else "" if block.type == "text" else f"[{block.type}, which cannot be shown]"
