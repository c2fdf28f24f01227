"""Calls of the user's code: with a time limit, awaited, in threads; see `user_code.py` for how it is found."""

import asyncio
import inspect
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

_loops: dict[int, asyncio.AbstractEventLoop] = {}  # process id -> event loop: a forked process has no thread that runs the loop
_lock = threading.Lock()
_numbers = itertools.count()


def run_async(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end on the event loop that all calls in this process share.

    The loop is shared because HTTP clients and the like belong to the loop on which they were first used. It runs in a thread
    of its own, so that this also works where the calling thread already has a loop, as in a notebook.
    """
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return future.result()
    except BaseException:  # above all Ctrl-C: the coroutine must not go on in the background
        future.cancel()
        raise


async def await_all(
    calls: list[Callable[[], Awaitable[Any]]], timeout_s: float | None, concurrency: int
) -> list[Any | BaseException]:
    """Await several calls, `concurrency` at a time, each with a time limit of its own; None for no limit.

    Returns:
        For each call its result, or the exception that it raised: `TimeoutError` if it took too long.
    """
    turns = asyncio.Semaphore(concurrency)

    async def one(call: Callable[[], Awaitable[Any]]) -> Any:
        async with turns:  # waiting for a turn does not count towards the time limit
            return await asyncio.wait_for(call(), timeout_s)

    return await asyncio.gather(*(one(call) for call in calls), return_exceptions=True)


def call_within(function: Callable[[], Any], timeout_s: float | None) -> Any:
    """Call an ordinary function with a time limit; None for no limit.

    A thread cannot be stopped: a function that takes too long goes on in the background, and its result is ignored.

    Raises:
        TimeoutError: If the function takes longer than `timeout_s`.
    """
    if timeout_s is None:
        return function()
    future: Future[Outcome] = Future()
    threading.Thread(target=lambda: future.set_result(outcome_of(function)), name="user-code", daemon=True).start()
    value, error = future.result(timeout_s)
    if error is not None:
        raise error
    return value


class TookTooLongError(TimeoutError):
    """A call was given up, since it took longer than it may; a TimeoutError may also come from the called function itself."""


Outcome = tuple[Any, BaseException | None]  # what a call returned, or else what it raised


def outcome_of(function: Callable[[], Any]) -> Outcome:
    """Call a function, whatever it raises."""
    try:
        return function(), None
    except BaseException as error:  # SystemExit and StopIteration, which mean something to event loops, included
        return None, error


@dataclass(eq=False)
class _Call:
    function: Callable[[], Any]
    outcome: "asyncio.Future[Outcome]"
    timeout_s: float
    began: float = 0.0  # by `time.monotonic`


class CallThreads:
    """Threads in which ordinary functions run for an event loop; see `call_within`.

    Calls wait in a queue: one thread is enough while they are short, since handing over each call to a thread of its own takes
    far longer than an answer that is there at once. While they take long there are twice as many every few milliseconds.

    Args:
        most: Calls that run at the same time, at most; those that were given up do not count.
    """

    _GROW_S, _IDLE_S = 0.002, 1.0  # seconds in which a call should have ended, and after which an idle thread ends

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._waiting: SimpleQueue[_Call] = SimpleQueue()
        self._running: set[_Call] = set()
        self._ended: deque[tuple[_Call, Outcome]] = deque()
        self._asked = self._begun = 0  # calls; one that a thread has just taken is in neither of the two above
        self._threads = 0  # without those that run a call that was given up
        self._watched = self._told = False  # whether the event loop will look at the calls, and at those that have ended

    async def outcome(self, function: Callable[[], Any], timeout_s: float | None) -> Outcome:
        """Await an ordinary function. `timeout_s` after it is called the outcome is `TookTooLongError`; None is no limit."""
        loop = asyncio.get_running_loop()
        call = _Call(function, loop.create_future(), float("inf") if timeout_s is None else timeout_s)
        with self._lock:
            self._waiting.put(call)
            self._asked += 1
            if not self._threads:
                self._add_thread(loop)
        if not self._watched:
            self._watched = True
            loop.call_later(self._GROW_S, self._watch, loop, self._begun)
        return await call.outcome

    def _add_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        self._threads += 1
        threading.Thread(target=self._run, args=(loop,), name="user-code", daemon=True).start()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            try:
                call = self._waiting.get(timeout=self._IDLE_S)
            except Empty:
                with self._lock:
                    if self._waiting.empty():
                        self._threads -= 1
                        return
                continue
            call.began = time.monotonic()
            with self._lock:
                self._begun += 1
                self._running.add(call)
            outcome = outcome_of(call.function)
            with self._lock:
                if call not in self._running:  # it was given up
                    return
                self._running.remove(call)
                self._ended.append((call, outcome))
                told, self._told = self._told, True
            if not told:
                with suppress(RuntimeError):  # the loop has been closed meanwhile
                    loop.call_soon_threadsafe(self._settle)
            del call, outcome  # while it waits for the next one

    def _settle(self) -> None:
        with self._lock:
            ended, self._ended, self._told = self._ended, deque(), False
        for call, outcome in ended:
            if not call.outcome.done():
                call.outcome.set_result(outcome)

    def _watch(self, loop: asyncio.AbstractEventLoop, begun: int) -> None:
        """Give up calls that take too long, and add threads for those that wait; so many calls had `begun` the last time."""
        now = time.monotonic()
        with self._lock:
            for call in [call for call in self._running if now - call.began > call.timeout_s]:
                self._running.remove(call)
                self._threads -= 1
                self._ended.append((call, (None, TookTooLongError())))
            waiting = self._asked - self._begun
            if self._begun == begun:
                for _ in range(min(max(1, self._threads), waiting, self.most - self._threads)):
                    self._add_thread(loop)
            self._watched = bool(self._running or waiting)
            left = min((call.began + call.timeout_s - now for call in self._running), default=0.0)
        self._settle()
        if self._watched:
            loop.call_later(self._GROW_S if waiting else max(self._GROW_S, min(left, 0.1)), self._watch, loop, self._begun)


async def outcome_awaited(work: Awaitable[Any], timeout_s: float | None, name: str | None = None) -> Outcome:
    """Await something in a task of this name, whatever it raises.

    What takes longer than `timeout_s` (None: no limit) is cancelled, and not waited for if it ignores that; its outcome is
    `TookTooLongError`.
    """

    async def caught() -> Outcome:
        try:
            return await work, None
        except BaseException as error:
            return None, error

    task = asyncio.create_task(caught(), name=name)
    try:
        await asyncio.wait({task}, timeout=timeout_s)
        if not task.done():
            return None, TookTooLongError()
        return (None, asyncio.CancelledError()) if task.cancelled() else task.result()
    finally:
        task.cancel()


def outcome_within(function: Callable[[], Any], timeout_s: float, then: Callable[[Any], Any] = lambda value: value) -> Outcome:
    """Call a function, await what it returns if that is to be awaited, and do `then` with the value, all within a time limit.

    It is awaited on the event loop that all calls share (see `run_async`), or where code of another call holds that up for a
    quarter of the time, on one of its own; if it was held up in the middle, the function is called once more. The outcome after
    `timeout_s` is `TookTooLongError`.
    """
    until = time.monotonic() + timeout_s

    def called() -> Outcome:
        value, error = outcome_of(function)
        return (value, error) if error is not None or inspect.isawaitable(value) else outcome_of(lambda: then(value))

    async def run(value: Awaitable[Any], settled: Future[Outcome], name: str) -> None:
        async def whole() -> None:
            try:
                settled.set_result((then(await value), None))
            except BaseException as error:
                settled.set_result((None, error if time.monotonic() < until else TookTooLongError()))

        if settled.set_running_or_notify_cancel():  # otherwise another loop has it
            await outcome_awaited(whole(), until - time.monotonic(), name)

    value: Any = None
    for shared in (True, False):
        if value is None:
            try:
                value, error = call_within(called, max(0.0, until - time.monotonic()))
            except TimeoutError:  # of `call_within`: those of the function are in the outcome
                break
            if error is not None or not inspect.isawaitable(value):
                return value, error
        loop, settled, name = _loop() if shared else _new_loop(), Future[Outcome](), f"user-code-{next(_numbers)}"
        work = asyncio.run_coroutine_threadsafe(run(value, settled, name), loop)
        outcome = _result(settled, loop, name, until)
        has_begun = not settled.cancel()
        if outcome is not None or (has_begun and settled.done()):
            outcome = outcome or settled.result()
            if not shared and not isinstance(outcome[1], TookTooLongError):  # what takes too long goes on
                loop.call_soon_threadsafe(loop.stop)
            return outcome
        if has_begun:
            work.cancel()
            value = None
    return None, TookTooLongError()


def _result(settled: Future[Outcome], loop: asyncio.AbstractEventLoop, name: str, until: float) -> Outcome | None:
    """The outcome of a call in the task `name` of an event loop; None if code of another call holds up the loop.

    If code holds it up, others get a new loop from now on. At `until`, by `time.monotonic`, the outcome is `TookTooLongError`.
    """
    quarter_s = max(0.0, until - time.monotonic()) / 4
    for _ in range(4):
        goes_on = threading.Event()
        loop.call_soon_threadsafe(goes_on.set)
        with suppress(TimeoutError):
            return settled.result(quarter_s)
        if not goes_on.is_set():
            with _lock:
                if _loops.get(os.getpid()) is loop:
                    del _loops[os.getpid()]
            holding = asyncio.current_task(loop)
            if holding is not None and holding.get_name() != name:
                return None
    return None, TookTooLongError()


def _loop() -> asyncio.AbstractEventLoop:
    with _lock:
        if os.getpid() not in _loops:
            _loops.clear()
            _loops[os.getpid()] = _new_loop()
        return _loops[os.getpid()]


def _new_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="user-code-loop", daemon=True).start()
    return loop
