"""`MathVerifier`: starts the worker process that compares mathematical answers (`math_worker.py`), and talks to it.

The comparison needs a process of its own because sympy may hang, and math-verify can stop it only in a main thread.
"""

import atexit
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from threading import Lock
from typing import Any

from hybrid_lightning.errors import RewardError

_PLAIN = re.compile(r"-?\d{1,15}(?:\.\d{1,9})?")  # as most reference answers are, which needs no question to the worker


class MathVerifier:
    """Client of the worker process, which it starts at the first question, and again if the process has died.

    Args:
        cpu_seconds: CPU time that one comparison may take. It is not wall time, so that a text gets the same reward on a busy
            machine.
    """

    def __init__(self, cpu_seconds: float) -> None:
        self.cpu_seconds = cpu_seconds
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0  # id of the process that started the worker: a fork inherits the pipes, but must not use them
        self._golds: dict[str, bool] = {}
        atexit.register(self._close)

    def is_gold(self, gold: str) -> bool:
        """Whether a reference answer is a number or formula with which answers can be compared."""
        if gold not in self._golds:
            self._golds[gold] = _PLAIN.fullmatch(gold) is not None or self._ask([gold]) is True
        return self._golds[gold]

    def equal(self, gold: str, text: str) -> bool | None:
        """Whether the answer in a text equals the reference answer; None if that exceeded the time or memory limit."""
        reply = self._ask([gold, text])
        return None if reply is None else bool(reply)

    def value(self, text: str) -> str | None:
        """The answer in a text, the same for equal numbers; None if there is none, or the time or memory limit was exceeded."""
        reply = self._ask({"value": text})
        return None if reply is None else str(reply)

    def _ask(self, request: list[str] | dict[str, str]) -> Any:
        with self._lock:
            for _ in range(2):  # a second time if the system or another user ended the process, and not the request
                process = self._running()
                try:
                    reply = self._exchange(process, json.dumps(request))
                except BaseException:  # above all Ctrl-C: an unread reply would be taken for the reply to the next request
                    self._close()
                    raise
                if reply:
                    return json.loads(reply)
                out_of_time = process.wait() == -signal.SIGPROF
                self._close()
                if out_of_time:
                    return None
            return None

    @staticmethod
    def _exchange(process: "subprocess.Popen[str]", request: str) -> str:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            return process.stdout.readline()
        except BrokenPipeError:
            return ""

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None or self._owner != os.getpid():
            script = Path(__file__).with_name("math_worker.py")
            # -P keeps the script's folder off the import path: our modules there must not hide those of the standard library.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(script), str(self.cpu_seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            self._owner = os.getpid()
            assert self._process.stdout is not None
            if self._process.stdout.readline() != "ready\n":
                self._close()
                raise RewardError(
                    "the process that compares mathematical answers does not start: see what "
                    f"`{sys.executable} -P {script} 5` says"
                )
        return self._process

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()
