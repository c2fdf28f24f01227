"""`RolloutFuture`: a rollout in progress, and `in_thread`: a call in a separate thread.

    future = loop.sample(prompts, generator)               begun: by servers, or sampled already in this process
    future = future.then(score)                             then processed, in the thread that requests the result
    future.result()

This file needs only Python, since it is also read in the workers of vLLM servers.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

from hybrid_lightning.errors import RolloutError

_T = TypeVar("_T")
_U = TypeVar("_U")
_SLICE_S = 0.1  # the main thread waits for this long, then looks at signals
_END_S = 4.0  # time for cancelled work to end, after waiting for it was interrupted


class RolloutFuture(Generic[_T]):
    """A rollout in progress: like a `concurrent.futures.Future`, but the thread that requests the result computes the last part.

    The first part may run elsewhere, on servers or in another thread; `wait` waits for it. `result` computes the rest, once. An
    engine in this process has sampled before it gives one: only what was added by `then` is left.

    If waiting or computing fails, the work in progress is cancelled, and the next `result` raises the same exception. A requested
    stop of the run is also raised as an exception.

    Args:
        compute: Computes the result.
        source: Work that has to finish before that.
        context: Makes the context for waiting and computing.
        on_wait: Called from time to time while waiting for `source`, if that is a `concurrent.futures.Future`.
        on_cancel: Called when this future is cancelled. A `RolloutFuture` as `source` is cancelled as well.

    Attributes:
        waited_s: Seconds spent waiting for it.

    Example:
        >>> RolloutFuture(lambda: [1, 2]).then(sum).result()
        3
    """

    def __init__(
        self,
        compute: Callable[[], _T],
        source: "RolloutFuture[Any] | Future[Any] | None" = None,
        *,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        on_wait: Callable[[], object] = lambda: None,
        on_cancel: Callable[[], object] = lambda: None,
    ) -> None:
        self._compute: Callable[[], _T] | None = compute
        self._source, self._context = source, context
        self._on_wait, self._on_cancel = on_wait, on_cancel
        self._values: list[_T] = []  # the result, once it is known
        self._failure: BaseException | None = None
        self._cancelled = False
        self._is_remote: bool = isinstance(source, Future) or (source is not None and source._is_remote)
        self._waited = not self._is_remote
        self.waited_s = 0.0

    @classmethod
    def of(cls, value: _T) -> "RolloutFuture[_T]":
        """A future for a value that exists already."""
        return RolloutFuture(lambda: value)

    def then(self, function: Callable[[_T], _U], on_cancel: Callable[[], object] = lambda: None) -> "RolloutFuture[_U]":
        """A future for a function of the result, computed in the thread that requests it."""
        return RolloutFuture(lambda: function(self.result()), self, on_cancel=on_cancel)

    def within(self, context: Callable[[], AbstractContextManager[Any]]) -> "RolloutFuture[_T]":
        """This future, awaited and computed within a context."""
        return RolloutFuture(self.result, self, context=context)

    def done(self) -> bool:
        """Whether nothing is left to wait for: background work is finished or was cancelled."""
        return self._cancelled or self._waited or (self._source is not None and self._source.done())

    def cancel(self) -> bool:
        """Begin to end background work, because its result is no longer needed; False if the result is already known."""
        if self._values or self._cancelled:
            return self._cancelled
        self._cancelled = True
        self._on_cancel()
        if isinstance(self._source, RolloutFuture):
            self._source.cancel()
        return True

    def wait(self) -> None:
        """Wait for background work; `result` has little left to do afterwards.

        Raises:
            RolloutError: If it has failed. Other exceptions come from the background work.
        """
        if self._failure is not None:
            raise self._failure
        if self._waited or self._cancelled:
            return
        source, began = self._source, time.perf_counter()
        try:
            with self._context():
                if isinstance(source, RolloutFuture):
                    source.wait()
                elif source is not None:
                    while not wait([source], _SLICE_S).done:
                        self._on_wait()
                    self._on_wait()
                    if self._compute is not None and (source.cancelled() or source.exception() is not None):
                        self._compute()  # raises
        except BaseException as error:
            self._fail(error)
            if isinstance(source, Future):  # servers are notified before the process ends
                wait([source], _END_S)
            raise
        finally:
            self.waited_s += time.perf_counter() - began
        self._waited = True

    def result(self) -> _T:
        """The result; the remaining work is done now.

        Raises:
            RolloutError: If it was cancelled. Other exceptions come from the work itself.
        """
        if self._values:
            return self._values[0]
        if self._failure is not None:
            raise self._failure
        if self._cancelled:
            raise RolloutError("the rollout was cancelled")
        self.wait()
        assert self._compute is not None, "the result is not known yet"
        try:
            with self._context():
                self._values.append(self._compute())
        except BaseException as error:
            self._fail(error)
            raise
        self._compute = self._source = None  # their results need not stay in memory
        return self._values[0]

    def _fail(self, error: BaseException) -> None:
        self.cancel()
        if not isinstance(error, KeyboardInterrupt):  # an interrupt is meant for this moment only
            self._failure = error


def in_thread(call: Callable[[], _T], name: str) -> "Future[_T]":
    """Make a call in a separate thread, which does not keep the process alive."""
    answer: Future[_T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True, name=name).start()
    return answer
