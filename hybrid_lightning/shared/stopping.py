"""How a signal ends a run: immediately if nothing can be lost, else at the next point from which the run can resume.

This file needs only Python, so a process can handle signals before it imports torch, which takes seconds.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

# Sent by, in this order: Ctrl-C; schedulers, `kill` and torchrun; SLURM before its time limit (`--signal=USR1@120`); a closing
# terminal. Windows does not have all of them.
_SIGNALS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")]

NOTHING_MADE = "there is nothing to resume from yet; start the command again"


class RunStopped(SystemExit):
    """Ends a run after a stop signal. The process exits with 128 + the number of the signal, as is usual in shells.

    Args:
        number: Number of the signal.
        together: Whether the ranks have agreed to stop together.
    """

    def __init__(self, number: int, together: bool = False) -> None:
        super().__init__(128 + number)
        self.number, self.together = number, together
        self.explained = False  # whether the user has been shown how to resume


class StopSignals:
    """Handles the signals that end a run, from `take_over` on.

    The first signal raises `RunStopped`: immediately or, within `deferred`, at the next `check` or `interruptible`. A second
    signal ends the process immediately.
    """

    # Whether another rank of the same command started this process. That rank passes its signals on, and a terminal also sends
    # them to all its processes, so a second signal is not a second request.
    started_by_rank = False

    def __init__(self) -> None:
        self.requested = 0  # number of the first signal; 0 if there was none
        self.started_ranks: Sequence[int] = ()  # ids of processes that this one started; signals are passed on to them
        self.last_words: Callable[[], str] = lambda: NOTHING_MADE
        self._deferred = 0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def taken_over(self) -> bool:
        """Whether this object handles the signals."""
        return bool(self._previous)

    def take_over(self) -> None:
        """Handle the signals of this process, even if another library has installed its handlers in the meantime.

        Only the main thread can; in other threads, nothing happens.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            current = signal.getsignal(number)
            # Under `nohup`, SIGHUP stays ignored. A shell without job control also makes background programs ignore SIGINT, but
            # SIGINT is still handled, since a SIGINT to such a program is sent on purpose.
            if number.name == "SIGHUP" and current == signal.SIG_IGN:
                continue
            if current != self._handle:
                self._previous.setdefault(number, current)
                signal.signal(number, self._handle)

    def inform(self, started_ranks: Sequence[int], last_words: Callable[[], str]) -> None:
        """Take what a run knows: the processes that it has started, and how to resume it."""
        self.started_ranks, self.last_words = started_ranks, last_words

    def request(self, number: int) -> None:
        """Note a signal that stopped a part of the run; the next `check` raises."""
        self.requested = number

    def give_back(self) -> None:
        """Restore the previous handlers, and forget a handled signal."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous, self.requested, self.started_ranks = {}, 0, ()

    def check(self) -> None:
        """Raise `RunStopped` if a signal has come."""
        if self.requested:
            raise RunStopped(self.requested)

    def defer(self) -> None:
        """Make all further signals wait for the next `check` or `interruptible`."""
        self._deferred += 1

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Context for code that must not be interrupted: a signal waits for the next `check` or `interruptible`."""
        self.defer()
        try:
            yield
        finally:
            self._deferred -= 1

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Context for code that changes no state: a signal raises immediately, even inside `deferred`."""
        self.check()
        outside, self._deferred = self._deferred, 0
        try:
            yield
        finally:
            self._deferred = outside

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested and self.started_by_rank:
            return
        if self.requested:
            self._pass_on(getattr(signal, "SIGKILL", signal.SIGTERM))  # on Windows, SIGTERM ends a process immediately
            _say(f"\n{name}: stopped immediately; {self.last_words()}\n")
            os._exit(128 + number)
        self.requested = number
        self._pass_on(number)
        if not self.started_by_rank:
            _say(f"\n{name}: stopping at a point where the run can resume; send it again to stop immediately\n")
        if not self._deferred:
            raise RunStopped(number)

    def _pass_on(self, number: int) -> None:
        for process in self.started_ranks:
            with suppress(ProcessLookupError):
                os.kill(process, number)


def _say(text: str) -> None:
    # Not through sys.stderr: the signal may have interrupted it while it was writing.
    with suppress(OSError):
        os.write(2, text.encode())
