"""Episodes in this process: calls of the environments, their time limits and faults, and random states of their own.

Everything is on one event loop: `async` methods run on it, the others in threads.
"""

import asyncio
import inspect
import os
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hybrid_lightning.environments.answers import OddAnswerError, checked_messages, checked_step
from hybrid_lightning.environments.environment import Environment, Step
from hybrid_lightning.environments.process_state import RandomStates
from hybrid_lightning.errors import ConfigError, HybridLightningError
from hybrid_lightning.stopping import RunStopped
from hybrid_lightning.types import Message, Prompt
from hybrid_lightning.user_calls import CallThreads, TookTooLongError, outcome_awaited, outcome_of
from hybrid_lightning.user_code import describe_error

BEGUN_AGAIN = 2  # times at most, after an environment's own fault
CLOSE_S, _CLOSE_AGAIN_S = 10.0, 0.1  # seconds that a `close` may take, and after one that took longer
_THREADS = 64  # steps that run at the same time
T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """An episode is left out: its environment failed by its own fault, also when it was begun again."""

    reason: str  # one line


@dataclass(frozen=True)
class TimedOut:
    """An episode ends: a step took longer than it may."""

    reason: str  # one line


@dataclass
class Episode:
    """All that an episode can be begun again from."""

    number: int  # within its rollout
    prompt: Prompt
    seed: int
    started: tuple[Message, ...] | None = None  # what `start` answered; None before
    turns: list[tuple[Message, Step]] = field(default_factory=list)  # messages of the policy, with what they were answered
    begun: int = 0  # how often, but not after another episode's fault

    def place(self, turn: int) -> str:
        """Where something went wrong, for messages; turn 0 is the start."""
        return f"{f'at turn {turn}' if turn else 'at the start'} of {self.prompt.place} (seed {self.seed})"

    def lost(self) -> "Episode":
        """A record from which it is begun again after another episode's fault."""
        return Episode(self.number, self.prompt, self.seed, self.started, list(self.turns), max(0, self.begun - 1))


Started = tuple[Message, ...] | Failure
Answer = tuple[Message, ...] | Step | Failure | TimedOut  # to a start, or a message


class PassedOnError(Exception):
    """An exception that is no fault of an environment, and ends the run."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class _FaultError(Exception):
    """The environment's own fault, on one line."""


class _HungError(_FaultError):
    """A fault after which an episode is not begun again, since that would take as long."""


class _EscapedError(Exception):
    """Holds an exception that would end the event loop, such as SystemExit."""


@dataclass(eq=False)
class _Running:
    """The object of an episode, and what it is doing."""

    episode: Episode
    states: RandomStates | None  # None where they are not swapped
    environment: Any = None  # None until it is made
    turn: int = 0  # 0: it starts


_current: ContextVar[_Running | None] = ContextVar("running episode", default=None)


class LocalEpisodes:
    """Runs episodes in this process. Its methods are called on its event loop.

    Args:
        environment: The object of the config.
        step_timeout_s: Seconds for each call.
        alone: Whether the process is there for episodes alone: calls then run one at a time, without time limits.
        called: Called before each call of an environment with the method, the episode and whether it is a new turn.
    """

    def __init__(
        self,
        environment: Environment,
        step_timeout_s: float,
        alone: bool = False,
        called: Callable[[str, Episode, bool], None] = lambda method, episode, new_turn: None,
    ) -> None:
        kind = type(environment)
        self.environment, self.step_timeout_s, self.alone, self.called = environment, step_timeout_s, alone, called
        self.name = kind.__name__
        self.asynchronous = any(inspect.iscoroutinefunction(getattr(kind, name)) for name in ("start", "step", "close"))
        self.own_states = alone or not kind.thread_safe
        self.swaps_on_loop = self.asynchronous and not alone  # whenever code goes on; otherwise for all of a call
        self.running: dict[int, _Running] = {}
        self.holds_up: tuple[int, float] | None = None  # the episode whose code is on the event loop, and since when
        self.given_up = False  # since such code did not end: what has gone on without it must not be changed any more
        self.close_fault = ""  # the first one
        self._close_s = CLOSE_S
        self.loop = asyncio.new_event_loop()
        self.loop.set_task_factory(self._make_task)  # type: ignore[arg-type]
        self.thread = threading.Thread(target=self.loop.run_forever, name="episodes", daemon=True)  # where it is not `alone`
        self._threads = CallThreads(_THREADS if kind.thread_safe else 1)
        # What takes turns: calls in threads, if the global generators are swapped for them.
        self._turns = nullcontext() if self.asynchronous or kind.thread_safe else asyncio.Semaphore(1)

    async def advance(self, episode: Episode, message: Message | None) -> Answer:
        """Start an episode (`message` None), or let its environment answer; begin it again where that fails, or it does not run.

        Raises:
            PassedOnError: What is no fault of the environment.
        """
        started: tuple[Message, ...] = ()
        while True:
            try:
                if episode.number in self.running:
                    self.running[episode.number].episode = episode
                else:
                    started = await self._begin(episode)
                return started if message is None else await self._step(episode, len(episode.turns) + 1, message)
            except TookTooLongError as late:
                await self.end([episode.number])
                return TimedOut(str(late))
            except _FaultError as fault:
                await self.end([episode.number])
                if isinstance(fault, _HungError) or episode.begun > BEGUN_AGAIN:
                    return Failure(str(fault))

    async def end(self, numbers: Iterable[int]) -> None:
        """Close the environments of episodes, as far as they run here. What goes wrong is noted in `close_fault`."""
        ended = [self.running.pop(number) for number in numbers if number in self.running]
        await asyncio.gather(*(self._close(running) for running in ended if running.environment is not None))

    async def _close(self, running: _Running) -> None:
        try:
            await self._call(running, "close", lambda: running.environment.close())
        except (TookTooLongError, _FaultError, PassedOnError) as fault:
            self.close_fault = self.close_fault or str(fault)
            if isinstance(fault, TookTooLongError):
                self._close_s = _CLOSE_AGAIN_S

    async def _begin(self, episode: Episode) -> tuple[Message, ...]:
        """Make the object of an episode, start it, and let it answer what it has answered before."""
        episode.begun += 1
        running = self.running[episode.number] = _Running(
            episode, RandomStates.from_seed(episode.seed) if self.own_states else None
        )
        try:
            running.environment = await self._call(running, "new", self._made)
            prompt = deepcopy(episode.prompt)  # it is shared by the episodes of a group
            value = await self._call(running, "start", lambda: running.environment.start(prompt, episode.seed))
            started = self._checked(running, "start", checked_messages, value)
            if episode.started is not None and started != episode.started:
                raise self._differs(running)
            for turn, (message, before) in enumerate(episode.turns, start=1):
                step = await self._step(episode, turn, message)
                if (step.messages, step.reward, step.over) != (before.messages, before.reward, before.over):
                    raise self._differs(running)
        except TookTooLongError as late:
            raise _HungError(str(late)) from None
        return started

    def _made(self) -> Environment:
        environment = self.environment.new()
        if environment is self.environment:
            raise ConfigError(
                f"{self.name} makes one object for all episodes, which would share its state; make a new one each time"
            )
        environment.step_timeout_s = self.step_timeout_s
        return environment

    def _differs(self, running: _Running) -> _FaultError:
        return _FaultError(
            f"{self.name} answered otherwise {running.episode.place(running.turn)} when it was begun again after a fault; all "
            "that is random in it has to follow from the seed"
        )

    async def _step(self, episode: Episode, turn: int, message: Message) -> Step:
        running = self.running[episode.number]
        running.turn = turn
        given = dict(message)  # the environment may change it
        value = await self._call(running, "step", lambda: running.environment.step(given))
        return self._checked(running, "step", checked_step, value)

    def _checked(self, running: _Running, method: str, check: Callable[[Any], T], value: Any) -> T:
        try:
            with self._on_loop(running):  # since the value may be an object that computes, or waits
                return check(value)
        except OddAnswerError as odd:
            fault = str(odd)
        except Exception as error:  # raised by objects that only look like data
            fault = f"returned something that raised {describe_error(error)} when it was read"
        raise _FaultError(f"{self.name}.{method} {fault}; {running.episode.place(running.turn)}")

    async def _call(self, running: _Running, method: str, function: Callable[[], Any]) -> Any:
        """What a call of an environment returns, awaited if it is to be awaited.

        Raises:
            TookTooLongError, _FaultError, PassedOnError: Why it returned nothing.
        """
        self.called(method, running.episode, running.turn > len(running.episode.turns))
        async with self._turns:
            timeout_s = min(self.step_timeout_s, self._close_s) if method == "close" else self.step_timeout_s
            limit_s = None if self.alone else timeout_s
            with nullcontext() if self.swaps_on_loop else self._states_of(running):
                if self.asynchronous:
                    with self._on_loop(running):
                        value, error = outcome_of(function)
                else:
                    value, error = await self._threads.outcome(function, limit_s)
                if inspect.isawaitable(value):
                    token = _current.set(running)  # for `_make_task`
                    try:
                        value, error = await outcome_awaited(value, limit_s)
                    finally:
                        _current.reset(token)
        place = running.episode.place(running.turn)
        if isinstance(error, TookTooLongError):
            limit = "" if method == "close" else "episodes.step_timeout_s="
            raise TookTooLongError(late_message(self.name, method, f"{limit}{timeout_s:g}", place))
        error = error.__cause__ if isinstance(error, _EscapedError) else error
        if isinstance(error, (HybridLightningError, RunStopped)):  # Ctrl-C reaches the main thread alone
            raise PassedOnError(error) from error
        if error is not None:
            raise _FaultError(f"{self.name}.{method} raised {describe_error(error)} {place}") from error
        return value

    def _make_task(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **kwargs: Any) -> asyncio.Task[Any]:
        """A task of the event loop. Those that an environment's code makes, such as by `asyncio.gather`, are the episode's."""
        running = _current.get()
        return asyncio.Task(work if running is None else _await(_Resumed(self, running, work)), loop=loop, **kwargs)

    @contextmanager
    def _on_loop(self, running: _Running) -> Iterator[None]:
        """Within this context an environment's code runs on the event loop."""
        self.holds_up = running.episode.number, time.monotonic()
        try:
            with self._states_of(running) if self.swaps_on_loop else nullcontext():
                yield
        finally:
            self.holds_up = None

    @contextmanager
    def _states_of(self, running: _Running) -> Iterator[None]:
        """Within this context the global generators are the episode's."""
        if running.states is None:
            yield
            return
        outside, folder = RandomStates.now(), os.getcwd()
        running.states.restore()
        try:
            yield
        finally:
            if not self.given_up:
                running.states = RandomStates.now()
                outside.restore()
                os.chdir(folder)


def late_message(name: str, method: str, limit: str, place: str) -> str:
    """What is said about a call that took too long."""
    return f"{name}.{method} took more than {limit} s {place}"


class _Resumed:
    """Awaits a coroutine of an episode: each time that it goes on, it does so with the episode's random states."""

    def __init__(self, process: LocalEpisodes, running: _Running, work: Coroutine[Any, Any, Any]) -> None:
        self.process, self.running, self.work = process, running, work

    def __await__(self) -> Generator[Any, Any, Any]:
        value, error = None, None
        while True:
            with self.process._on_loop(self.running):
                try:
                    awaited = self.work.send(value) if error is None else self.work.throw(error)
                except StopIteration as stop:
                    return stop.value
                except (SystemExit, KeyboardInterrupt) as escaped:
                    raise _EscapedError from escaped
            try:
                value, error = (yield awaited), None
            except GeneratorExit:  # its event loop is gone
                with suppress(RuntimeError):
                    self.work.close()
                raise
            except BaseException as thrown:
                value, error = None, thrown


async def _await(resumed: _Resumed) -> Any:
    return await resumed
