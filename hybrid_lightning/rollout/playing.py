"""Plays the episodes of a rollout: coroutines that ask the policy for messages. The engine decides when a message is sampled.

    Rounds    in this process: when every live episode waits for the policy or has ended, all their requests in one batch,
              ordered by episode. So batches, and with them the bits, do not depend on the clock.
    Alone     like it, for episodes that wait for nothing but the policy
    AtOnce    elsewhere: each request when it comes. A slow environment holds up its own episode alone.

The coroutines run on the event loop of `user_calls`, on which `async` environments run, too. If one of them blocks the loop, all
episodes continue on another loop from where they waited. Those of `Alone` need no event loop: the calling thread runs them.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from types import coroutine
from typing import Any, Self

from hybrid_lightning.errors import RolloutError
from hybrid_lightning.rollout.future import RolloutFuture
from hybrid_lightning.rollout.interface import AskPolicy, MessageRequest, Playable, Sampled
from hybrid_lightning.shared.user_calls import Heartbeat, LoopLostError, begin_async, run_async

_END_S = 10.0  # time for episodes to end after they were cancelled
_TURNS = 50  # of the event loop, in which a program in this process passes a request on


async def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Surroundings:
    """What surrounds the coroutines of a rollout: by default nothing."""

    blocked_s: float = inf  # longest time in seconds for which code may block the event loop
    # Context in which code of episodes runs in this process; None if none does.
    within: Callable[[], AbstractContextManager[Any]] | None = None
    finish: Callable[[], Awaitable[None]] = _nothing  # awaited after the last episode, also after a failure
    concurrency: int | None = None  # most episodes that are played at once; None: all, each of which asks once at a time


NOTHING = Surroundings()


class _Tasks:
    """The coroutines of live episodes, on the event loop."""

    def __init__(self, episodes: Sequence[Playable], ask: AskPolicy, concurrency: int | None) -> None:
        self._episodes, self._ask = {episode.number: episode for episode in episodes}, ask
        self._concurrency = len(episodes) if concurrency is None else concurrency
        self._tasks: dict[int, asyncio.Task[None]] = {}  # of the episodes that have begun, by episode
        self.failure: BaseException | None = None  # the first one
        self._ended: Callable[[], None] = lambda: None
        self._is_ending = False

    def __len__(self) -> int:
        return len(self._episodes)

    def begin(self, on_end: Callable[[], None]) -> object:
        """Begin the coroutines that have not begun; `on_end` is called after the end of each. See `are_on` for the result."""
        self._ended = on_end
        self._begin_more()
        return self._tasks

    def _begin_more(self) -> None:
        if len(self._tasks) == min(self._concurrency, len(self._episodes)):
            return
        for number, episode in self._episodes.items():
            if number not in self._tasks and len(self._tasks) < self._concurrency:
                task = self._tasks[number] = asyncio.create_task(episode.play(self._ask))
                task.add_done_callback(partial(self._end, number))

    @property
    def begun(self) -> int:
        """Number of live episodes that have begun."""
        return len(self._tasks)

    def are_on(self, begun: object) -> bool:
        """Whether the episodes still are on the event loop on which `begin` gave this."""
        return self._tasks is begun

    def _end(self, number: int, task: asyncio.Task[None]) -> None:
        if self._tasks.get(number) is not task:
            return  # on an abandoned event loop
        del self._tasks[number], self._episodes[number]
        if not task.cancelled() and task.exception() is not None:
            self.failure = self.failure or task.exception()
        if self.failure is None and not self._is_ending:
            self._begin_more()
        self._ended()

    def relocate(self) -> None:
        """Let the episodes continue on another event loop, by `begin`."""
        self._tasks = {}
        self._episodes = {number: episode.relocated() for number, episode in self._episodes.items()}

    async def cancel(self) -> None:
        """End the coroutines."""
        self._is_ending = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_END_S)


class Rounds:
    """Plays episodes in this process, in rounds; the caller samples, and may be any thread.

    Args:
        episodes: The episodes, in order.
        around: What surrounds the coroutines.

    Example:
        `while asked := rounds.advance(messages): messages = session.sample(asked)`, within `rounds`.
    """

    def __init__(self, episodes: Sequence[Playable], around: Surroundings) -> None:
        self._tasks = _Tasks(episodes, self._ask, around.concurrency)
        self._around, self._within = around, around.within or nullcontext
        self._waiting: dict[asyncio.Future[Sampled], MessageRequest] = {}
        self._answers: list[asyncio.Future[Sampled]] = []  # of the last round
        self._settled: asyncio.Event | None = None  # set when all live episodes wait, or one has failed

    def advance(self, messages: Sequence[Sampled] = ()) -> list[MessageRequest]:
        """Give the episodes the messages that they asked for, and continue until all live ones wait for the policy again.

        Returns:
            Their requests, ordered by episode, and of one episode by their tokens; none after the last episode. The first
            exception of an episode is raised.
        """
        waiting: list[tuple[asyncio.Future[Sampled], MessageRequest]] = []
        while len(self._tasks):
            try:
                with self._within():
                    waiting = run_async(self._continue(messages), self._around.blocked_s)
                break
            except LoopLostError:
                self._tasks.relocate()
                self._waiting, self._answers, messages = {}, [], ()
        if self._tasks.failure is not None:
            raise self._tasks.failure
        self._answers = [answer for answer, _ in waiting]
        return [request for _, request in waiting]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """End what is left of the episodes, and what surrounds them."""
        with self._within(), suppress(LoopLostError):
            run_async(self._finish(), self._around.blocked_s)

    async def _ask(self, request: MessageRequest) -> Sampled:
        answer: asyncio.Future[Sampled] = asyncio.get_running_loop().create_future()
        self._waiting[answer] = request
        self._look()
        try:
            return await answer
        finally:
            if self._waiting.pop(answer, None) is not None:  # the episode has given up
                self._look()

    async def _continue(self, messages: Sequence[Sampled]) -> list[tuple[asyncio.Future[Sampled], MessageRequest]]:
        self._settled = asyncio.Event()
        for answer, message in zip(self._answers, messages, strict=True):
            if not answer.done():  # the episode has given up
                answer.set_result(message)
        self._tasks.begin(self._look)
        while True:
            self._look()
            await self._settled.wait()
            if self._around.concurrency is not None:  # episodes may ask several times at once, and give up
                count = -1
                while count != len(self._waiting):
                    count = len(self._waiting)
                    for _ in range(_TURNS):
                        await asyncio.sleep(0)
            if self._has_settled:
                break
            self._settled.clear()
        waiting = sorted(self._waiting.items(), key=lambda entry: (entry[1].episode, entry[1].row, *entry[1].ids))
        self._waiting = {}
        return waiting

    @property
    def _has_settled(self) -> bool:
        if self._tasks.failure is not None or not len(self._tasks):
            return True
        return len({request.episode for request in self._waiting.values()}) == self._tasks.begun

    def _look(self) -> None:
        may_have = len(self._waiting) >= self._tasks.begun or self._tasks.failure is not None
        if self._settled is not None and may_have and self._has_settled:
            self._settled.set()

    async def _finish(self) -> None:
        await self._tasks.cancel()
        await self._around.finish()


class Alone:
    """Plays episodes in this process that wait for nothing but the policy, in the calling thread: used like `Rounds`.

    An event loop would take as long for a rollout of short completions as decoding one of their tokens.
    """

    def __init__(self, episodes: Sequence[Playable]) -> None:
        self._asked: list[MessageRequest] = []
        self._live: list[Coroutine[Any, Any, None]] = [episode.play(self._ask) for episode in episodes]

    def advance(self, messages: Sequence[Sampled] = ()) -> list[MessageRequest]:
        """See `Rounds.advance`."""
        live, self._live, self._asked = self._live, [], []
        answers: Sequence[Sampled | None] = messages or [None] * len(live)
        for episode, message in zip(live, answers, strict=True):
            try:
                episode.send(message)
            except StopIteration:
                continue
            self._live.append(episode)
        return self._asked

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """End what is left of the episodes."""
        for episode in self._live:
            episode.close()

    async def _ask(self, request: MessageRequest) -> Sampled:
        self._asked.append(request)
        return await _sent()


@coroutine
def _sent() -> Generator[None, Sampled, Sampled]:
    return (yield)


class AtOnce:
    """Plays episodes while the calling thread continues.

    Args:
        episodes: The episodes.
        ask: Samples a message elsewhere.
        around: What surrounds the coroutines.
        on_end: Called after the last episode, in any thread.
    """

    def __init__(
        self, episodes: Sequence[Playable], ask: AskPolicy, around: Surroundings, on_end: Callable[[], object] = lambda: None
    ) -> None:
        self._tasks, self._around, self._on_end = _Tasks(episodes, ask, around.concurrency), around, on_end
        self._work: Future[None] = Future()  # done after the last episode, on whichever event loop it ended
        self._run: Future[None] | None = None  # on the current event loop
        self._heartbeat: Heartbeat | None = None

    def begin(self, on_wait: Callable[[int], object] = lambda live: None) -> RolloutFuture[None]:
        """Begin to play; if code of episodes runs in this process, when the result is requested.

        The thread that waits for the end calls `on_wait` from time to time, with the number of live episodes.
        """
        if self._around.within is not None:
            return RolloutFuture(lambda: self._begun(on_wait).result(), context=self._around.within, on_cancel=self._cancel)
        return self._begun(on_wait)

    def _begun(self, on_wait: Callable[[int], object]) -> RolloutFuture[None]:
        self._continue()

        def waited() -> None:
            on_wait(len(self._tasks))
            self._watch()

        return RolloutFuture(self._work.result, self._work, on_wait=waited, on_cancel=self._cancel)

    def _cancel(self) -> None:
        if self._run is None:
            self._on_end()
        else:
            begin_async(self._stop())

    async def _stop(self) -> None:
        self._tasks.failure = self._tasks.failure or RolloutError("the episodes were ended")
        self._look()

    def _continue(self) -> None:
        self._run = begin_async(self._all())
        self._run.add_done_callback(self._end)

    def _look(self) -> None:
        if not len(self._tasks) or self._tasks.failure is not None:
            self._ended.set()

    async def _all(self) -> None:
        self._ended = asyncio.Event()
        begun = self._tasks.begin(self._look)
        try:
            self._look()
            await self._ended.wait()
        finally:
            if self._tasks.are_on(begun):  # else this is thrown away with its event loop, and episodes continue on another
                await self._tasks.cancel()
                await self._around.finish()
        if self._tasks.failure is not None:
            raise self._tasks.failure

    def _end(self, run: Future[None]) -> None:
        if run is not self._run:
            return  # on an abandoned event loop
        self._on_end()
        if (failure := run.exception()) is None:
            self._work.set_result(None)
        else:
            self._work.set_exception(failure)

    def _watch(self) -> None:
        """Continue on another event loop if code has blocked this one."""
        self._heartbeat = self._heartbeat or Heartbeat(self._around.blocked_s)
        try:
            self._heartbeat.check()
        except LoopLostError:
            self._heartbeat = None
            self._tasks.relocate()
            self._continue()
