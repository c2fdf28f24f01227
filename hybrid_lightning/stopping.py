"""How a signal ends a run: at once where nothing can be lost, else at the next moment from which the run can go on.

Needs Python alone, so that a process can take its signals over before torch is imported, which takes seconds.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

# Ctrl-C; schedulers, `kill` and torchrun; SLURM before its limit (`--signal=USR1@120`); a terminal that is closed.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))

NOTHING_MADE = "nothing that a run could go on from has been made; start the command again"


class RunStopped(SystemExit):
    """Ends a run that a signal asked to stop; the process exits with 128 + the signal's number, as shells have it.

    Args:
        number: Of the signal.
        together: Whether all ranks stop, as they have told each other.
    """

    def __init__(self, number: int, together: bool = False) -> None:
        super().__init__(128 + number)
        self.number, self.together = number, together
        self.explained = False  # whether it has been said what there is to go on from


class StopSignals:
    """The signals that end a run. Without `take_over` it asks for nothing, and all that it offers does nothing.

    The first signal raises `RunStopped`, at once or, within `deferred`, at the next `check` or `at_once`. A second one ends the
    process where it is.

    Args:
        started_by_rank: Whether another rank of the same command started this process. That rank hands its signals on, and a
            terminal sends them to all of its processes itself: here a second one is no new wish.
    """

    def __init__(self, started_by_rank: bool = False) -> None:
        self.requested = 0  # number of the first signal
        self.started_ranks: Sequence[int] = ()  # processes that this one started, which have to hear of it as well
        self.last_words: Callable[[], str] = lambda: NOTHING_MADE
        self.started_by_rank = started_by_rank
        self._deferred = 0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def taken_over(self) -> bool:
        """Whether signals come here."""
        return bool(self._previous)

    def take_over(self) -> None:
        """Let the signals of this process come here, also where another library has taken them meanwhile.

        Only the main thread may do so; elsewhere nothing happens.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            current = signal.getsignal(number)
            # `nohup` means what it says. A shell without job control lets programs in the background ignore Ctrl-C as well, but
            # a SIGINT that is sent to one of them on purpose is meant.
            if number.name == "SIGHUP" and current == signal.SIG_IGN:
                continue
            if current != self._handle:
                self._previous.setdefault(number, current)
                signal.signal(number, self._handle)

    def give_back(self) -> None:
        """Put the handlers back that there were before, and forget a signal that has been dealt with."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous, self.requested, self.started_ranks = {}, 0, ()

    def check(self) -> None:
        """Raise `RunStopped` if a signal has come."""
        if self.requested:
            raise RunStopped(self.requested)

    def defer(self) -> None:
        """Let signals wait for the next `check` or `at_once` from now on."""
        self._deferred += 1

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this context a signal waits for the next `check` or `at_once`: what runs here must not be torn apart."""
        self.defer()
        try:
            yield
        finally:
            self._deferred -= 1

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this context, inside of `deferred` too, a signal raises at once: what runs here changes nothing that counts."""
        self.check()
        outside, self._deferred = self._deferred, 0
        try:
            yield
        finally:
            self._deferred = outside

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            if not self.started_by_rank:
                self._leave(number, name)
            return
        self.requested = number
        for process in self.started_ranks:
            with suppress(ProcessLookupError):
                os.kill(process, number)
        if not self.started_by_rank:
            _say(f"\n{name}: stopping, so that the run can go on later; once more stops at once\n")
        if not self._deferred:
            raise RunStopped(number)

    def _leave(self, number: int, name: str) -> None:
        for process in self.started_ranks:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        _say(f"\n{name}: stopped at once; {self.last_words()}\n")
        os._exit(128 + number)


def _say(text: str) -> None:
    # Not by sys.stderr, in the middle of whose own writing the signal may have come.
    with suppress(OSError):
        os.write(2, text.encode())
