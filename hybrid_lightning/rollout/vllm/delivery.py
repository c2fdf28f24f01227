"""`Delivery`: gives one vLLM server the weights of an update, in a thread of its own.

All servers are given the weights of the same one pass over the policy's, which other ranks may be part of: the thread that makes
the pass has one weight in memory, waits until all servers have taken it, and leaves behind those that fail.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Self

from torch import Tensor

from hybrid_lightning.errors import RolloutError


class Delivery:
    """An update of one server: its thread iterates over this to get the weights, and what it raises becomes `failure`."""

    def __init__(self, work: Callable[[Self], None]) -> None:
        self.failure: RolloutError | None = None
        self._changed = threading.Condition()
        self._asks = self._closed = self._ended = False
        self._weight: tuple[str, Tensor] | None = None
        threading.Thread(target=self._run, args=(work,), daemon=True, name="weights for a vLLM server").start()

    def asks(self, limit: float) -> bool:
        """Wait up to `limit` seconds until the thread is ready for a weight, done with the one before; False if it has failed."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._asks or self._ended, limit):
                self._fail(f"it took no weight for {limit:.0f} s")
            return self._asks and self.failure is None

    def give(self, name: str, value: Tensor) -> None:
        """Give the thread the weight that it asks for. The value has to stay as it is until the next is asked for."""
        with self._changed:
            self._weight, self._asks = (name, value), False
            self._changed.notify_all()

    def end(self, limit: float) -> None:
        """No more weights come: wait up to `limit` seconds until the server has loaded them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._ended, limit):
                self._fail(f"it did not end the update within {limit:.0f} s")

    def cut(self) -> None:
        """No more weights come, and those that came are not all."""
        with self._changed:
            self._fail("the update was cut short")

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each weight, for the thread."""
        while True:
            with self._changed:
                self._asks = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._weight is not None or self._closed)
                weight, self._weight = self._weight, None
                if self.failure is not None:
                    raise self.failure
            if weight is None:
                return
            yield weight
            del weight

    def _run(self, work: Callable[[Self], None]) -> None:
        failure: RolloutError | None = None
        try:
            work(self)
        except RolloutError as error:
            failure = error
        except Exception as error:  # of gloo, NCCL or vLLM
            failure = RolloutError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        with self._changed:
            self.failure = self.failure or failure
            self._ended, self._weight = True, None
            self._changed.notify_all()

    def _fail(self, why: str) -> None:
        self.failure = self.failure or RolloutError(why)
        self._closed = True
        self._changed.notify_all()
