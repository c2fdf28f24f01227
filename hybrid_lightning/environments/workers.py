"""`Worker`: another process that holds environments and answers one call at a time.

In a worker process each episode has its own states of the global random generators. A process that hangs is killed; its other
episodes start again at their next call. Worker processes see no GPU, and end with the process that started them.
"""

import asyncio
import json
import os
import pickle
import queue
import random
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from hybrid_lightning.environments.environment import Environment
from hybrid_lightning.environments.objects import (
    CLOSE_S,
    FaultError,
    LateError,
    LostError,
    Objects,
    late_message,
    random_states,
    restore_random_states,
)
from hybrid_lightning.errors import ConfigError, EpisodeError, HybridLightningError, one_line
from hybrid_lightning.shared.user_calls import run_async
from hybrid_lightning.shared.user_code import describe_error

_READY_S = 300.0  # time for a process to start and import its modules
_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from hybrid_lightning.environments.workers import main; main()"
)
_NO_GPU = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), "")


def workers_for(environment: Environment, count: int, step_timeout_s: float, turn_rewards: bool) -> "list[Worker]":
    """Processes for environments, started on first use.

    Args:
        environment: The object of the config.
        count: Number of processes.
        step_timeout_s: Passed to each object.
        turn_rewards: Passed to each object.

    Raises:
        ConfigError: If the environment cannot be made in another process.
    """
    if not hasattr(os, "killpg"):
        raise ConfigError(
            f"episodes.workers={count} needs Linux or macOS: {sys.platform} has no process groups; leave it out, or train under "
            "WSL"
        )
    kind = type(environment)
    try:
        if kind.__module__ == "__main__":
            raise TypeError("it is defined in the script itself")
        made_of = pickle.dumps((kind, environment._init_args, environment.chat_template, step_timeout_s, turn_rewards))
    except Exception as error:
        raise ConfigError(
            f"episodes.workers={count}: {kind.__name__} cannot be made in another process: {one_line(error)}; define it, and any "
            "functions among its arguments, at the top level of a module, or leave out workers"
        ) from error
    return [Worker(kind.__name__, made_of) for _ in range(count)]


class Worker:
    """Handle of a process that holds environments.

    Args:
        name: Name of the environment's class.
        made_of: Data from which the process makes its environments.
    """

    def __init__(self, name: str, made_of: bytes) -> None:
        self.name, self.close_s = name, CLOSE_S
        self._made_of = made_of
        self._numbers: set[int] = set()  # episodes with objects there
        self._turn = asyncio.Semaphore(1)
        self._popen: subprocess.Popen[bytes] | None = None
        self._connection: Connection

    def has(self, number: int) -> bool:
        """Whether there is an object for an episode. The object is lost with the process."""
        return number in self._numbers

    def drop(self, number: int) -> None:
        """Forget the object of an episode."""
        self._numbers.discard(number)

    async def call(self, number: int, method: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        """Call a method of an episode's object; "start" makes the object; see `Objects.call`."""
        async with self._turn:
            if method != "start" and not self.has(number):
                raise LostError(f"{self.name} was lost with its process")
            try:
                if self._popen is None:
                    self._popen = self._started()
                    await self._is_ready()
                (self._numbers.discard if method == "close" else self._numbers.add)(number)
                with suppress(OSError):  # if the process has ended, `_received` finds out
                    self._connection.send((number, method, arguments))
                return await self._received(method, timeout_s)
            except asyncio.CancelledError:  # after Ctrl-C: the answer is no longer needed
                self.kill()
                raise

    async def _is_ready(self) -> None:
        try:
            await self._received("import", _READY_S)
        except FaultError as fault:
            raise EpisodeError(f"{fault}; see its error output above, and check what its module does on import") from None

    async def _received(self, method: str, timeout_s: float) -> Any:
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        descriptor = self._connection.fileno()
        loop.add_reader(descriptor, readable.set)
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(readable.wait(), timeout_s)
        finally:
            loop.remove_reader(descriptor)
        if not readable.is_set():
            self.kill()
            raise LateError(late_message(self.name, method, timeout_s))
        try:
            value, error = self._connection.recv()
        except (EOFError, OSError):
            raise FaultError(f"{self.name}.{method} ended its process with exit code {self.kill()}") from None
        if error is not None:
            raise error
        return value

    def kill(self) -> int | None:
        """End the process and everything it has started. Returns its exit code."""
        self._numbers = set()
        if self._popen is None:
            return None
        ended = self._popen.poll()
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        code = self._popen.wait() if ended is None else ended
        self._connection.close()
        self._popen = None
        return code

    def _started(self) -> subprocess.Popen[bytes]:
        self._connection, theirs = Pipe()
        # The same order of sets in all workers. In their own session, the terminal's signals do not reach them.
        environment = {"PYTHONHASHSEED": "0", **os.environ, **_NO_GPU, "OMP_NUM_THREADS": "1"}
        popen = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._connection.send_bytes(self._made_of)
        return popen


def main() -> None:
    """Main function of a worker process: answers calls until the other end is closed."""
    descriptor, parent = int(sys.argv[2]), int(sys.argv[3])
    if sys.platform == "linux":
        from hybrid_lightning.sandbox.privileges import die_with_parent  # importable only on Linux

        die_with_parent(parent)
    connection = Connection(descriptor)
    sys.argv = sys.argv[:1]
    try:
        kind, arguments, chat_template, *told = pickle.loads(connection.recv_bytes())
        environment = kind(**arguments)
        environment.prepare(chat_template)
    except Exception as error:
        text = (
            f"the environment cannot be made in another process: {describe_error(error)}; leave out episodes.workers, or fix it"
        )
        connection.send((None, error if isinstance(error, HybridLightningError) else ConfigError(text)))
        return
    connection.send((None, None))
    objects, states = Objects(environment, *told), dict[int, Any]()
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, requests), daemon=True).start()
    while True:
        number, method, arguments = requests.get()
        if method == "start":
            for seed_it in (random.seed, np.random.seed, torch.manual_seed):
                seed_it(arguments[1])  # the seed of the episode
        else:
            restore_random_states(states[number])
        try:
            # Without a time limit: the process is killed if it takes too long.
            reply: tuple[Any, Exception | None] = run_async(objects.call(number, method, arguments, None)), None
        except (FaultError, HybridLightningError) as error:
            reply = None, error
        states[number] = random_states()
        connection.send(reply)


def _read(connection: Connection, requests: "queue.SimpleQueue[Any]") -> None:
    """Read requests while calls are answered, so that the end of the other process is noticed immediately."""
    try:
        while True:
            requests.put(connection.recv())
    except BaseException:
        os._exit(0)
