"""Calls of the user's code that are cancelled leave nothing behind."""

import asyncio
import inspect
import threading
from contextlib import suppress

import pytest

from hybrid_lightning.shared import user_calls
from hybrid_lightning.shared.user_calls import CallThreads, run_async


@pytest.mark.parametrize("when", ["before the function returns", "after it has returned"])
def test_a_coroutine_that_will_not_be_awaited_is_closed(monkeypatch, when):
    """Python would warn that it was never awaited."""
    entered, cancelled, made = threading.Event(), threading.Event(), []
    tasks, settle, closed = [], user_calls._settle, threading.Event()

    async def answer():
        """What the function returns."""

    def function():
        made.append(answer())
        entered.set()
        cancelled.wait(60)
        return made[0]

    def settle_and_look(future, outcome):
        settle(future, outcome)
        if when == "after it has returned":
            tasks[0].cancel()
        asyncio.get_running_loop().call_later(0, closed.set)

    async def call_and_cancel():
        tasks.append(asyncio.create_task(user_calls.call(function, threads=CallThreads())))
        while not entered.is_set():
            await asyncio.sleep(0)
        if when == "before the function returns":
            tasks[0].cancel()
            with suppress(asyncio.CancelledError):
                await tasks[0]
        cancelled.set()
        with suppress(asyncio.CancelledError):
            await tasks[0]

    monkeypatch.setattr(user_calls, "_settle", settle_and_look)
    run_async(call_and_cancel())
    assert closed.wait(60) and inspect.getcoroutinestate(made[0]) == inspect.CORO_CLOSED
