"""`Workers`: processes in which episodes run, each one at a time.

One that hangs is killed, and its other episodes are begun anew. They see no GPU, and end with the process that started them.
"""

import asyncio
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

from hybrid_lightning.environments.environment import Environment
from hybrid_lightning.environments.local_episodes import (
    BEGUN_AGAIN,
    CLOSE_S,
    Answer,
    Episode,
    Failure,
    LocalEpisodes,
    PassedOnError,
    TimedOut,
    late_message,
)
from hybrid_lightning.errors import ConfigError, EpisodeError, HybridLightningError, one_line
from hybrid_lightning.types import Message
from hybrid_lightning.user_code import describe_error

_READY_S = 300.0  # seconds for a process to import what it needs
_SLICE_S = 0.1  # in which replies are waited for
_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from hybrid_lightning.environments.workers import main; main()"
)
_NO_GPU = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), "")
Request = tuple[Episode, Message | None] | list[int]  # an episode that starts or gets a message; or numbers of those that end


class Workers:
    """Processes in which episodes run, episode n in process n % count; they are started when they are needed.

    For the arguments see `RunningEpisodes`; `step_timeout_s` is for each call of an environment.

    Raises:
        ConfigError: If the environment cannot be made in another process.
    """

    def __init__(
        self, environment: Environment, count: int, step_timeout_s: float, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        if not hasattr(os, "killpg"):
            raise ConfigError(
                f"episodes.workers={count} needs Linux or macOS: {sys.platform} has no groups of processes that can be ended "
                "together; leave it out, or train under WSL"
            )
        kind = type(environment)
        self.name, self.step_timeout_s, self.close_fault, self.on_wait = kind.__name__, step_timeout_s, "", on_wait
        try:
            if kind.__module__ == "__main__":
                raise TypeError("it is defined in the script itself")
            made_of = pickle.dumps((kind, environment._init_args, environment.chat_template, step_timeout_s))
        except Exception as error:
            raise ConfigError(
                f"episodes.workers={count}: {self.name} cannot be made in another process: {one_line(error)}; define it, and the "
                "functions that it is given, at the top level of a module, or leave out workers"
            ) from error
        self._processes = [_Process(made_of) for _ in range(count)]

    def advance(self, jobs: Sequence[tuple[Episode, Message | None]], note: Callable[[int, Answer], None]) -> None:
        """Let episodes answer a message of the policy, or start (None), and give each answer to `note`.

        How often they have begun is written into them.
        """
        for episode, message in jobs:
            self._processes[episode.number % len(self._processes)].requests.append((episode, message))
        self._exchange(note)

    def end(self, numbers: Iterable[int]) -> None:
        """Close the environments of episodes. What goes wrong is noted in `close_fault`."""
        for process in self._processes:
            if ended := [number for number in numbers if number in process.live]:
                process.requests.append(ended)
        self._exchange(lambda number, answer: None)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()

    def _exchange(self, note: Callable[[int, Answer], None]) -> None:
        """Send what is requested, and receive the replies."""
        try:
            while busy := [process for process in self._processes if process.proceed()]:
                self.on_wait()
                left = max(0.0, min(process.deadline for process in busy) - time.monotonic())
                ready = wait([process.connection for process in busy if process.connection], min(left, _SLICE_S))
                for process in busy:
                    if process.connection in ready:
                        self._receive(process, note)
                    elif time.monotonic() > process.deadline:
                        self._lost(process, note, late=True)
        except BaseException:  # Ctrl-C, or what ends the run
            for process in self._processes:
                process.requests.clear()
                process.kill()
            raise

    def _receive(self, process: "_Process", note: Callable[[int, Answer], None]) -> None:
        assert process.connection is not None
        try:
            kind, value = process.connection.recv()
        except (EOFError, OSError):
            self._lost(process, note, late=False)
            return
        if kind == "raised":
            raise value
        if kind == "called":
            process.method, new_turn, begun = value
            process.in_turn = process.method == "step" and new_turn
            if process.method != "close" and isinstance(process.current, tuple):
                process.current[0].begun = begun
            limit_s = min(CLOSE_S, self.step_timeout_s) if process.method == "close" else self.step_timeout_s
            process.deadline = time.monotonic() + limit_s
            return
        request, process.current, process.is_ready = process.current, None, True
        if kind == "ended":
            self.close_fault = self.close_fault or value
        elif kind == "answered":
            assert isinstance(request, tuple)
            if isinstance(value, (Failure, TimedOut)):
                del process.live[request[0].number]
            note(request[0].number, value)

    def _lost(self, process: "_Process", note: Callable[[int, Answer], None], late: bool) -> None:
        """Go on without a process that has taken too long, or has ended by itself: the fault of the episode that it was at."""
        request, method, in_turn, ready = process.current, process.method, process.in_turn, process.is_ready
        code = process.kill()
        if not ready:
            late_start = f"was not ready after {_READY_S:g} s; see what its module does on import"
            ended = f"ended with exit code {code} before it was ready; see its error output above"
            raise EpisodeError(f"a process for {self.name} {late_start if late else ended}")
        if isinstance(request, list):
            fault = "did not end" if late else f"ended its process with exit code {code}"
            self.close_fault = self.close_fault or f"{self.name}.close {fault}"
        elif request is not None:
            episode, message = request
            place = episode.place(0 if message is None else len(episode.turns) + 1)
            if late:
                text = late_message(self.name, method, f"episodes.step_timeout_s={self.step_timeout_s:g}", place)
                note(episode.number, TimedOut(text) if in_turn else Failure(text))
            elif episode.begun <= BEGUN_AGAIN:
                process.requests.appendleft(request)
            else:
                note(episode.number, Failure(f"{self.name}.{method} ended its process with exit code {code} {place}"))


class _Process:
    """One process, seen from the one that has started it."""

    def __init__(self, made_of: bytes) -> None:
        self.made_of = made_of
        self.requests: deque[Request] = deque()
        self.live: dict[int, Episode] = {}  # episodes whose objects are there
        self.popen: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None
        self.is_ready = False
        self.current: Request | None = None  # what it is at
        self.method = ""  # what is called for that
        self.in_turn = False  # whether it is the answer to the policy's last message
        self.deadline = 0.0

    def proceed(self) -> bool:
        """Send the next request if the last one is answered. Returns whether something is to be received."""
        if self.popen is None and self.requests:
            self._start()
        if self.is_ready and self.current is None and self.requests:
            assert self.connection is not None
            self.current = self.requests.popleft()
            if isinstance(self.current, list):
                for number in self.current:
                    self.live.pop(number, None)
            else:
                self.live[self.current[0].number] = self.current[0]
            self.deadline = time.monotonic() + _READY_S  # until the first call
            with suppress(OSError):  # if it has ended, the next `recv` says so
                self.connection.send(self.current)
        return self.current is not None or bool(self.popen and not self.is_ready)

    def kill(self) -> int | None:
        """End the process, and what it has started; its episodes have then to be begun anew. Returns its exit code."""
        if self.popen is None or self.connection is None:
            return None
        ended = self.popen.poll()
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        code = self.popen.wait() if ended is None else ended
        self.connection.close()
        if self.current is not None and isinstance(self.current, tuple):
            self.live.pop(self.current[0].number, None)
        for episode in self.live.values():
            episode.begun -= 1  # it was no fault of theirs
        self.live, self.popen, self.connection, self.current, self.is_ready = {}, None, None, None, False
        return code

    def _start(self) -> None:
        self.connection, theirs = Pipe()
        # The order of sets is the same in all of them; the terminal's signals do not reach them.
        environment = {"PYTHONHASHSEED": "0", **os.environ, **_NO_GPU, "OMP_NUM_THREADS": "1"}
        # The kernel ends a process with the thread that started it, so only the main thread may ask for that.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        self.popen = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, json.dumps(sys.path), str(theirs.fileno()), str(parent)],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self.deadline = time.monotonic() + _READY_S
        self.connection.send_bytes(self.made_of)


def main() -> None:
    """What a process runs: it reads requests and sends replies, until the other end is closed."""
    descriptor, parent = int(sys.argv[2]), int(sys.argv[3])
    if parent and sys.platform == "linux":
        from hybrid_lightning.sandbox.privileges import die_with_parent  # which Linux alone can import

        die_with_parent(parent)
    connection = Connection(descriptor)
    sys.argv = sys.argv[:1]
    try:
        kind, arguments, chat_template, step_timeout_s = pickle.loads(connection.recv_bytes())
        environment = kind(**arguments)
        environment.prepare(chat_template)

        def called(method: str, episode: Episode, new_turn: bool) -> None:
            connection.send(("called", (method, new_turn, episode.begun)))

        process = LocalEpisodes(environment, step_timeout_s, alone=True, called=called)
    except Exception as error:
        text = (
            f"the environment cannot be made in another process: {describe_error(error)}; leave out episodes.workers, or mend it"
        )
        connection.send(("raised", error if isinstance(error, HybridLightningError) else ConfigError(text)))
        return
    connection.send(("ready", None))
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, requests), daemon=True).start()
    asyncio.set_event_loop(process.loop)
    while True:
        request = requests.get()
        try:
            if isinstance(request, list):
                process.loop.run_until_complete(process.end(request))
                connection.send(("ended", process.close_fault))
            else:
                connection.send(("answered", process.loop.run_until_complete(process.advance(*request))))
        except PassedOnError as passed:
            connection.send(("raised", passed.error))
        except BaseException as error:  # an environment has stopped the event loop, or cancelled what runs on it
            os.write(2, f"a process of {process.name} ends: {describe_error(error)}\n".encode())
            os._exit(1)  # at once: Python takes seconds, in which the call would be late instead


def _read(connection: Connection, requests: "queue.SimpleQueue[Request]") -> None:
    """Read requests while others are worked on, so that the end of the other process is noticed at once."""
    try:
        while True:
            requests.put(connection.recv())
    except BaseException:
        os._exit(0)
