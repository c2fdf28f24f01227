"""Compares mathematical answers in a process apart, since sympy may hang, and math-verify stops it only in the main thread."""

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

_PLAIN = re.compile(r"-?\d{1,15}(?:\.\d{1,9})?")  # known to be good without asking, of which most answers are


class MathVerifier:
    """Client of the process in `math_worker.py`; starts it when first asked, and again when it has died.

    Args:
        cpu_seconds: CPU time that one comparison may take. CPU time and not wall time, so that the same text gets the same
            reward on a busy machine.
    """

    def __init__(self, cpu_seconds: float) -> None:
        self.cpu_seconds = cpu_seconds
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0  # a fork inherits the pipes, but must not use them
        self._golds: dict[str, bool] = {}
        atexit.register(self._close)

    def is_gold(self, gold: str) -> bool:
        """Whether a reference answer is a number or formula that can be compared with."""
        if gold not in self._golds:
            self._golds[gold] = _PLAIN.fullmatch(gold) is not None or self._ask([gold]) is True
        return self._golds[gold]

    def equal(self, gold: str, text: str) -> bool | None:
        """Whether the answer in a text equals the reference answer; None if that took more than the time or memory allowed."""
        reply = self._ask([gold, text])
        return None if reply is None else bool(reply)

    def value(self, text: str) -> str | None:
        """The answer in a text, written in one way for equal numbers; None if there is none, or it took more than allowed."""
        reply = self._ask({"value": text})
        return None if reply is None else str(reply)

    def _ask(self, request: list[str] | dict[str, str]) -> Any:
        with self._lock:
            for _ in range(2):  # once more if it was not the request that ended the process, but the system or another user
                process = self._running()
                try:
                    reply = self._exchange(process, json.dumps(request))
                except BaseException:  # Ctrl-C above all: a reply that nobody read would be taken for that to the next request
                    self._close()
                    raise
                if reply:
                    return json.loads(reply)
                out_of_time = process.wait() == -signal.SIGPROF
                self._close()
                if out_of_time:
                    break
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
            # -P: the folder of the script holds modules of ours, which must not hide those of the standard library.
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
