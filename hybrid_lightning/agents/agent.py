"""`Agent`: a program that solves a row of the data by talking to the policy, as it would talk to any model.

The policy is an OpenAI-compatible endpoint, `row["base_url"]`; the key `row["api_key"]` names the episode, and ends with it.
"""

import asyncio
import inspect
import json
import os
import shlex
import shutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hybrid_lightning.environments.answers import OddAnswerError, checked_reward
from hybrid_lightning.environments.calls import CallFormat
from hybrid_lightning.errors import ConfigError, shorten
from hybrid_lightning.shared.configurable import Configurable
from hybrid_lightning.shared.user_calls import CallThreads
from hybrid_lightning.shared.user_code import load_function

HERE = "127.0.0.1"
_TAIL = 65_536  # bytes of a command's output that are kept, from its end
_LOOK_S = 0.05  # interval of looks whether a command has ended
_END_S = 1.0  # time for a command's output to be read after its end


class AgentFaultError(Exception):
    """An agent failed; the text says how, on one line."""


@dataclass(frozen=True)
class AgentResult:
    """What an agent returned."""

    reward: float | None  # None: `model.reward` scores the conversation
    parts: Mapping[str, float] = field(default_factory=dict)  # further numbers for the logs


class Agent(Configurable, ABC):
    """Base class of agents.

    Args:
        concurrency: Most agents that run at once. In this process their messages are sampled together, so few make it slow.
        timeout_s: Longest time in seconds that an agent may take, without the time in which it waits for the policy.
        host: Address on which the endpoint listens. With 127.0.0.1, programs on this machine alone reach it. Others, such as
            containers, need another address; whoever reaches it then needs a key, but the connection is not encrypted.
        port: Port of the endpoint, of the first process; 0 for any free one.
        call_format: How the policy writes calls of tools; None for the format of its chat template, or `PlainCalls`.

    Raises:
        ConfigError: If a value is invalid.
    """

    def __init__(
        self,
        concurrency: int = 256,
        timeout_s: float = 120.0,
        host: str = HERE,
        port: int = 0,
        call_format: CallFormat | None = None,
    ) -> None:
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ConfigError(f"agent.concurrency={concurrency!r}; give a whole number of at least 1")
        if isinstance(timeout_s, bool) or not 0 < timeout_s < float("inf"):
            raise ConfigError(f"agent.timeout_s={timeout_s!r}; give a positive number of seconds")
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65_536:
            raise ConfigError(f"agent.port={port!r}; give a port, or 0 for any free one")
        self.concurrency, self.timeout_s, self.host, self.port, self.call_format = concurrency, timeout_s, host, port, call_format

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name in messages."""

    @property
    def is_threaded(self) -> bool:
        """Whether it runs beside this process's event loop, so that its requests may come in any order."""
        return True

    def check(self) -> None:
        """Check, before time is spent on a run, that it can be started; ConfigError if not."""

    @abstractmethod
    async def run(self, row: dict[str, Any], client: Callable[[bool], Any], threads: CallThreads) -> Any:
        """Solve a row.

        Args:
            row: The row's columns, with `prompt`, `answer`, `base_url` and `api_key`.
            client: Makes the client for a function, asynchronous or not; it returns None without the package `openai`.
            threads: Threads for ordinary functions.

        Returns:
            See `result_of`.

        Raises:
            AgentFaultError: If it failed in a way that is known here. Any other exception is a fault, too.
        """


class FunctionAgent(Agent):
    """A Python function as an agent.

    The function gets a row, a mapping with the columns of the data, `prompt` (a text or messages, as `data.format` makes it),
    `answer`, `base_url` and `api_key`; and a client of the package `openai`, or None without this package. An `async` function
    gets an `AsyncOpenAI`, which needs no socket; all run together on one event loop, so they must not block it. An ordinary
    function gets an `OpenAI`, and runs in a thread.

    It returns the episode's reward: a number, `{"reward": number, "parts": {name: number}}` with further numbers for the logs,
    or None where `model.reward` scores the conversation.

    Args:
        function: `package.module.function` or `path/to/file.py:function`; in Python also a function itself.
        concurrency: See `Agent`, as for the other arguments.
        timeout_s: See `Agent`.
        host: See `Agent`.
        port: See `Agent`.
        call_format: See `Agent`.

    Raises:
        ConfigError: If the function does not exist or does not take two arguments, or a value is invalid.

    Example:
        async def solve(row, client):
            answer = await client.chat.completions.create(model="policy", messages=[{"role": "user", "content": row["prompt"]}])
            return float(answer.choices[0].message.content.strip() == row["answer"])
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        concurrency: int = 256,
        timeout_s: float = 120.0,
        host: str = HERE,
        port: int = 0,
        call_format: CallFormat | None = None,
    ) -> None:
        super().__init__(concurrency, timeout_s, host, port, call_format)
        self._function = load_function(function, "agent.function") if isinstance(function, str) else function
        if not callable(self._function) or isinstance(self._function, type):
            raise ConfigError(f"agent.function={shorten(function)}; give a function of a row and a client")
        try:
            inspect.signature(self._function).bind({}, None)
        except TypeError as error:
            raise ConfigError(
                f"agent.function={self.name}: it is called as {self.name}(row, client), and {error}; give it these two parameters"
            ) from error

    @property
    def name(self) -> str:
        """The function's name."""
        return str(getattr(self._function, "__name__", type(self._function).__name__))

    @property
    def is_threaded(self) -> bool:
        """See `Agent`."""
        return not inspect.iscoroutinefunction(self._function)

    async def run(self, row: dict[str, Any], client: Callable[[bool], Any], threads: CallThreads) -> Any:
        """See `Agent`."""
        if not self.is_threaded:
            return await self._function(row, client(True))

        def called() -> Any:
            made = client(False)
            try:
                return self._function(row, made)
            finally:
                if made is not None:
                    made.close()

        value, error = await threads.outcome(called, None)
        if error is not None:
            raise error
        return await value if inspect.isawaitable(value) else value


class CommandAgent(Agent):
    """A command in any language as an agent.

    It gets `OPENAI_BASE_URL` and `OPENAI_API_KEY` in its environment, and the row as JSON on its standard input (see
    `FunctionAgent`). The last line of its standard output is the episode's reward: a number, `{"reward": number, "parts": {name:
    number}}`, or `null` where `model.reward` scores the conversation. An exit status other than 0 is a fault. At its end, and
    when its time is over, it is killed with all processes of its group.

    Args:
        command: The command, as a text that is split like a shell's, or as a list; no shell runs it.
        concurrency: See `Agent`, as for the other arguments.
        timeout_s: See `Agent`.
        host: See `Agent`.
        port: See `Agent`.
        call_format: See `Agent`.

    Raises:
        ConfigError: If there is no such program, or a value is invalid.
    """

    def __init__(
        self,
        command: str | list[str],
        concurrency: int = 32,
        timeout_s: float = 120.0,
        host: str = HERE,
        port: int = 0,
        call_format: CallFormat | None = None,
    ) -> None:
        super().__init__(concurrency, timeout_s, host, port, call_format)
        try:
            self._command = shlex.split(command) if isinstance(command, str) else [str(part) for part in command]
        except ValueError as error:
            raise ConfigError(f"agent.command={command!r} cannot be split: {error}; correct its quotes") from error
        if not self._command:
            raise ConfigError(f"agent.command={command!r} is empty; give a command, such as 'python my_agent.py'")

    @property
    def name(self) -> str:
        """The command."""
        return shlex.join(self._command)

    def check(self) -> None:
        """See `Agent`."""
        if shutil.which(self._command[0]) is None:
            raise ConfigError(
                f"agent.command={self.name}: there is no program {self._command[0]!r}; correct the path, or install the program"
            )

    async def run(self, row: dict[str, Any], client: Callable[[bool], Any], threads: CallThreads) -> Any:
        """See `Agent`."""
        given = json.dumps(row, ensure_ascii=False, default=str).encode(errors="replace")
        environment = {**os.environ, "OPENAI_BASE_URL": row["base_url"], "OPENAI_API_KEY": row["api_key"]}
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        reading = [asyncio.create_task(_tail(stream)) for stream in (process.stdout, process.stderr)]
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # it does not read its row
                process.stdin.write(given)
                await process.stdin.drain()
            with suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.close()
            # `process.wait` also waits for the output's end, which processes that it leaves behind may hold open.
            while process.returncode is None and not all(task.done() for task in reading):
                await asyncio.wait([task for task in reading if not task.done()], timeout=_LOOK_S)
            status = await process.wait() if process.returncode is None else process.returncode
        finally:
            with suppress(ProcessLookupError, PermissionError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.wait(reading, timeout=_END_S)
            for task in reading:
                task.cancel()
        output, errors = (task.result() if task.done() and not task.cancelled() else "" for task in reading)
        if status:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "")
            raise AgentFaultError(f"the command {how}{f': {shorten(last, 200)}' if last else ''}")
        line = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            shown = f"{shorten(line, 80)} as its last line" if line else "nothing"
            raise AgentFaultError(
                f'the command wrote {shown}; its last line must be a number, {{"reward": number}} or null'
            ) from error


async def _tail(stream: asyncio.StreamReader) -> str:
    """The end of what a command writes."""
    kept = b""
    while part := await stream.read(_TAIL):
        kept = (kept + part)[-_TAIL:]
    return kept.decode(errors="replace")


def result_of(value: Any, needs_number: bool) -> AgentResult:
    """What an agent returned, checked.

    Args:
        value: A number, None, or `{"reward": ..., "parts": {name: number}}`.
        needs_number: Whether the episode has no other reward.

    Raises:
        OddAnswerError: If it is something else.
    """
    reward: Any = value
    parts: Any = {}
    if isinstance(value, Mapping):
        reward, parts = value.get("reward"), value.get("parts") or {}
        if "reward" not in value or not isinstance(parts, Mapping):
            raise OddAnswerError(f"returned {shorten(value)}; it must have a reward, and numbers by name as parts")
    if reward is None and needs_number:
        raise OddAnswerError("returned no number, and there is no model.reward; return the reward, or set model.reward")
    made = {str(name): checked_reward(part) for name, part in parts.items()}
    return AgentResult(None if reward is None else checked_reward(reward), made)


if TYPE_CHECKING:
    AnyAgent = Agent | Callable[..., Any]
else:  # types that a config can give
    AnyAgent = Agent


def as_agent(given: "AnyAgent") -> Agent:
    """An agent unchanged, and a function as a `FunctionAgent`.

    Raises:
        ConfigError: If it is something else.
    """
    if isinstance(given, Agent):
        return given
    if not callable(given) or isinstance(given, type):
        raise ConfigError(f"agent={shorten(given)}; give a function of a row and a client, FunctionAgent or CommandAgent")
    return FunctionAgent(given)
