"""Calls the user's code, with time limits: `async` functions on one event loop, ordinary functions in a pool of threads.

    run_async(work)                  from any thread: run a coroutine on the event loop of this process
    await call(function, timeout_s)  call any function: awaited if it is `async`, else in a thread

A thread cannot be stopped: an ordinary function that takes too long continues in the background, and its result is ignored.
`user_code.py` finds the functions.
"""

import asyncio
import inspect
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent import futures
from contextlib import suppress
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any, TypeVar

_SLICE_S = 0.1  # interval at which a caller checks that the event loop still runs
_SIDE_BY_SIDE = 64  # most ordinary functions that run at the same time
_T = TypeVar("_T")

Outcome = tuple[Any, BaseException | None]  # result of a call, or the exception that it raised


class TookTooLongError(TimeoutError):
    """A call was abandoned because it took too long; a plain TimeoutError may come from the called function itself."""


class LoopLostError(RuntimeError):
    """The event loop of this process was blocked by code that runs on it. Later calls get a new one."""


def outcome_of(function: Callable[[], Any]) -> Outcome:
    """Call a function and return its outcome, whatever it raises."""
    try:
        return function(), None
    except BaseException as error:  # including SystemExit and StopIteration, which event loops treat specially
        return None, error


def run_async(
    work: Coroutine[Any, Any, Any], blocked_s: float = float("inf"), on_wait: Callable[[], object] = lambda: None
) -> Any:
    """Run a coroutine to its end on the event loop that all calls in this process share.

    The loop is shared because HTTP clients and similar objects belong to the loop that first used them. It runs in its own
    thread, so this also works if the calling thread already has a loop, as in a notebook.

    Args:
        work: The coroutine.
        blocked_s: Longest time in seconds for which code may block the loop.
        on_wait: Called from time to time while the calling thread waits; an exception from it cancels the coroutine.

    Raises:
        LoopLostError: If the loop was blocked for longer.
    """
    future, heartbeat = begin_async(work), Heartbeat(blocked_s)
    try:
        while not futures.wait([future], _SLICE_S).done:
            on_wait()
            heartbeat.check()
        return future.result()
    finally:  # above all after Ctrl-C: the coroutine must not continue in the background
        future.cancel()


def begin_async(work: Coroutine[Any, Any, _T]) -> futures.Future[_T]:
    """Begin to run a coroutine on the event loop that all calls in this process share (see `run_async`)."""
    return asyncio.run_coroutine_threadsafe(work, _shared().loop)


class Heartbeat:
    """Notices that code blocks the event loop of this process for longer than `blocked_s` seconds."""

    def __init__(self, blocked_s: float) -> None:
        self._shared, self._blocked_s = _shared(), blocked_s
        self._beat()

    def _beat(self) -> None:
        self._answered, self._since = threading.Event(), time.monotonic()
        self._shared.loop.call_soon_threadsafe(self._answered.set)

    def check(self) -> None:
        """Raise LoopLostError if the loop is blocked for too long; later calls then get a new loop."""
        if self._answered.is_set():
            self._beat()
        elif time.monotonic() - self._since > self._blocked_s:
            with _lock:
                if _shared_by.get(os.getpid()) is self._shared:
                    del _shared_by[os.getpid()]
            raise LoopLostError("code on the event loop has blocked it")


def is_shared(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether this is the shared event loop of this process, not one that was blocked and replaced, or a parent process's."""
    return _shared().loop is loop


async def call(
    function: Callable[[], Any],
    timeout_s: float | None = None,
    then: Callable[[Any], Any] = lambda value: value,
    threads: "CallThreads | None" = None,
    alone: bool = False,
) -> Outcome:
    """Call a function once, await its result if that is awaitable, and apply `then` to the value.

    Args:
        function: An `async` function is called on the event loop of this process, any other function in a thread.
        timeout_s: Time limit in seconds for everything, from the call of the function on; None for no limit. An awaitable that
            takes longer is cancelled, and abandoned if it ignores the cancellation.
        then: Applied where the function ran, so that an odd value can neither raise nor block here.
        threads: Threads for an ordinary function; by default the threads of the `async` function that calls it, or else the
            shared threads.
        alone: Whether an ordinary function must not run at the same time as others that are also called with `alone`.

    Returns:
        The outcome; its error is `TookTooLongError` if the time ran out.
    """
    shared = _shared()
    if asyncio.get_running_loop() is not shared.loop:
        there = asyncio.run_coroutine_threadsafe(call(function, timeout_s, then, threads, alone), shared.loop)
        return await asyncio.wrap_future(there)  # type: ignore[no-any-return]
    if inspect.iscoroutinefunction(function):
        work, error = outcome_of(function)
        return (None, error) if error is not None else await _awaited(work, timeout_s, then, threads)
    began = time.monotonic()

    def called() -> Any:
        nonlocal began
        began = time.monotonic()
        value = function()
        return value if inspect.isawaitable(value) else then(value)

    async with shared.alone if alone else shared.side_by_side:  # waiting for a place does not count towards the time limit
        value, error = await (threads or _threads.get() or shared.threads).outcome(called, timeout_s)
    if error is None and inspect.isawaitable(value):
        left_s = None if timeout_s is None else max(0.0, began + timeout_s - time.monotonic())
        return await _awaited(value, left_s, then, threads)
    return value, error


async def await_all(calls: list[Callable[[], Any]], timeout_s: float | None, concurrency: int) -> list[Any | BaseException]:
    """Call several functions, `concurrency` at a time, each with its own time limit; None for no limit.

    Returns:
        For each function its result, or the exception that it raised: `TimeoutError` if it took too long.
    """
    turns = asyncio.Semaphore(concurrency)

    async def one(function: Callable[[], Any]) -> Any:
        async with turns:  # waiting for a turn does not count towards the time limit
            value, error = await call(function, timeout_s)
            return value if error is None else error

    return await asyncio.gather(*map(one, calls))


async def _awaited(
    work: Awaitable[Any], timeout_s: float | None, then: Callable[[Any], Any], threads: "CallThreads | None"
) -> Outcome:
    async def whole() -> Outcome:
        if threads is not None:
            _threads.set(threads)  # only in the context of this task
        try:
            return then(await work), None
        except BaseException as error:  # SystemExit would end the event loop
            return None, error

    task = asyncio.create_task(whole())
    try:
        # Not `asyncio.wait_for`, which waits for as long as the code ignores its cancellation.
        await asyncio.wait({task}, timeout=timeout_s)
        return task.result() if task.done() else (None, TookTooLongError())
    finally:
        task.cancel()


class CallThreads:
    """Threads that run ordinary functions, one per call in progress. They do not delay the end of the process.

    Successive calls run in the same thread, until one of them takes too long, so objects that belong to a thread work.
    """

    def __init__(self) -> None:
        self._idle: list[_Calls] = []  # threads that wait for a call, each by its queue
        self._all: list[_Calls] = []

    async def outcome(self, function: Callable[[], Any], timeout_s: float | None) -> Outcome:
        """Run a function in one of the threads and await its outcome."""
        if self._idle:
            calls = self._idle.pop()
        else:
            self._all.append(calls := SimpleQueue())
            threading.Thread(target=_answer, args=(calls,), name="user-code", daemon=True).start()
        loop, too_late = asyncio.get_running_loop(), (None, TookTooLongError())
        outcome: asyncio.Future[Outcome] = loop.create_future()
        late = None if timeout_s is None else loop.call_later(timeout_s, _settle, outcome, too_late)
        calls.put((function, outcome))
        try:
            return await outcome
        except asyncio.CancelledError:  # it may have come after the outcome
            if not outcome.cancelled() and outcome.done():
                _discard(outcome.result())
            raise
        finally:
            if late is not None:
                late.cancel()
            if outcome.cancelled() or outcome.result() is too_late:
                calls.put(None)  # the thread ends when the call does
            else:
                self._idle.append(calls)

    def close(self) -> None:
        """End the threads, each after its call in progress; no calls may follow."""
        for calls in [*self._all]:
            calls.put(None)


_Calls = SimpleQueue[tuple[Callable[[], Any], "asyncio.Future[Outcome]"] | None]  # None ends the thread


def _answer(calls: _Calls) -> None:
    while (call := calls.get()) is not None:
        function, outcome = call
        with suppress(RuntimeError):  # the event loop has been closed in the meantime
            outcome.get_loop().call_soon_threadsafe(_settle, outcome, outcome_of(function))
        del call, function, outcome  # do not keep them while waiting for the next one


def _settle(future: "asyncio.Future[Outcome]", outcome: Outcome) -> None:
    if future.done():
        _discard(outcome)
    else:
        future.set_result(outcome)


def _discard(outcome: Outcome) -> None:
    """Close a coroutine that nobody will await any more; Python would warn."""
    if inspect.iscoroutine(outcome[0]):
        outcome[0].close()


class _Shared:
    """The event loop of a process, the threads of ordinary calls, and the limits on calls at the same time."""

    def __init__(self) -> None:
        self.loop, self.threads = asyncio.new_event_loop(), CallThreads()
        self.side_by_side, self.alone = asyncio.Semaphore(_SIDE_BY_SIDE), asyncio.Semaphore(1)
        threading.Thread(target=self.loop.run_forever, name="user-code-loop", daemon=True).start()


_threads: ContextVar[CallThreads | None] = ContextVar("threads", default=None)  # threads of the running `async` function
_shared_by: dict[int, _Shared] = {}  # by process id: a forked process has no thread that runs the loop
_lock = threading.Lock()


def _shared() -> _Shared:
    with _lock:
        if os.getpid() not in _shared_by:
            _shared_by.clear()
            _shared_by[os.getpid()] = _Shared()
        return _shared_by[os.getpid()]
