"""Call functions with a time limit: asynchronous ones on one shared event loop, ordinary ones in a thread."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any

_loops: dict[int, asyncio.AbstractEventLoop] = {}  # process id -> event loop: a forked process has no thread that runs the loop
_lock = threading.Lock()


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
    """Await several calls, a limited number at a time, each with a time limit of its own.

    Args:
        calls: Functions without arguments that return awaitables.
        timeout_s: Seconds for each call; None for no limit.
        concurrency: How many calls are awaited at the same time.

    Returns:
        For each call its result, or the exception that it raised: `TimeoutError` if it took too long.
    """
    turns = asyncio.Semaphore(concurrency)

    async def one(call: Callable[[], Awaitable[Any]]) -> Any:
        async with turns:  # waiting for a turn does not count towards the time limit
            return await asyncio.wait_for(call(), timeout_s)

    return await asyncio.gather(*(one(call) for call in calls), return_exceptions=True)


def call_within(function: Callable[[], Any], timeout_s: float | None) -> Any:
    """Call an ordinary function with a time limit.

    A thread cannot be stopped: a function that takes too long goes on in the background, and its result is ignored.

    Args:
        function: A function without arguments.
        timeout_s: Time limit in seconds; None for no limit.

    Raises:
        TimeoutError: If the function takes longer than `timeout_s`.
    """
    if timeout_s is None:
        return function()
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised in the caller's thread instead
            future.set_exception(error)

    threading.Thread(target=run, name="reward", daemon=True).start()
    return future.result(timeout_s)


def _loop() -> asyncio.AbstractEventLoop:
    with _lock:
        if os.getpid() not in _loops:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
            _loops.clear()
            _loops[os.getpid()] = loop
        return _loops[os.getpid()]
