"""Waiting for functions that may take too long: asynchronous ones on one event loop, ordinary ones in a thread."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any

_loops: dict[int, asyncio.AbstractEventLoop] = {}  # process -> its loop; a fork inherits no thread
_lock = threading.Lock()


def run_async(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end, on the one event loop that all calls of this process share.

    One loop, and not one a call, since clients for HTTP and the like belong to the loop that they were first used on. It runs in
    a thread, so that it also works where this thread has a loop already, as in a notebook.
    """
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return future.result()
    except BaseException:  # Ctrl-C above all: nothing is to go on unseen
        future.cancel()
        raise


async def await_all(
    calls: list[Callable[[], Awaitable[Any]]], timeout_s: float | None, concurrency: int
) -> list[Any | BaseException]:
    """Await calls, so many at a time, each within the time limit.

    Returns:
        For each call what it gave, or the exception that it raised; `TimeoutError` for one out of time.
    """
    turns = asyncio.Semaphore(concurrency)

    async def one(call: Callable[[], Awaitable[Any]]) -> Any:
        async with turns:  # the time runs from the call's turn
            return await asyncio.wait_for(call(), timeout_s)

    return await asyncio.gather(*(one(call) for call in calls), return_exceptions=True)


def call_within(function: Callable[[], Any], timeout_s: float | None) -> Any:
    """Call an ordinary function; one that is out of time goes on in its thread, since nothing can stop it, and is not heard.

    Raises:
        TimeoutError: If it takes longer than `timeout_s`.
    """
    if timeout_s is None:
        return function()
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # handed to the caller
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
