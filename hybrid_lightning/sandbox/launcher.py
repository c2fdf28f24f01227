"""The launcher: a process that starts the boxes of one program, waits for them and ends them.

Each program has a new launcher, so that nothing carries over from one program to the next.
"""

# The modules that programs and tests use most are imported once, before the boxes are forked. Many are not used here.
# ruff: noqa: F401
import bisect
import collections
import datetime
import functools
import heapq
import itertools
import json
import math
import operator
import os
import random
import re
import signal
import string
import sys
import threading
import time
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from hybrid_lightning.sandbox import box, landlock, libc, namespaces, privileges, seccomp

_PATIENCE_S = 0.1  # seconds for boxes to end by themselves


def main() -> None:
    """Carry out the request in the first argument, in JSON.

    Its keys are `parent` (process id), `probe` (true to only report which mechanisms work), `report` (descriptor for the result),
    `mechanisms`, `readable`, `packages`, `limits`, and `boxes`, a list of objects with `role` and the descriptors `stdin`,
    `stdout`, `stderr`, `job` and `verdict`, null for /dev/null.
    """
    spec = json.loads(sys.argv[1])
    privileges.die_with_parent(spec["parent"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored, as inherited from a trainer, exit codes of boxes get lost
    outcome = _probe(spec["readable"]) if spec.get("probe") else _run(spec)
    os.pwrite(spec["report"], json.dumps(outcome).encode(), 0)


def _probe(readable: Sequence[str]) -> dict[str, str]:
    """Try each mechanism of isolation in a separate process; returns its name -> why it does not work, empty if it works."""

    def try_landlock() -> None:
        privileges.drop(None)
        landlock.restrict(readable, [])

    def try_seccomp() -> None:
        privileges.drop(None)
        seccomp.install(threads=False)

    def try_namespaces() -> None:
        namespaces.unshare()
        if os.fork() == 0:
            namespaces.change_root(readable, 2**20)
            os._exit(0)
        if os.wait()[1]:
            raise OSError("a new root folder cannot be made")

    return {
        name: _attempt(action)
        for name, action in (("namespaces", try_namespaces), ("landlock", try_landlock), ("seccomp", try_seccomp))
    }


def _attempt(action: Callable[[], None]) -> str:
    """Perform an action in a forked process; returns why it failed, or an empty text."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        reason = ""
        try:
            action()
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
        os.write(writing, json.dumps(reason).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else "the process that tried it was killed"


def _run(spec: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    null = os.open(os.devnull, os.O_RDWR)
    errors_in, errors_out = os.pipe()
    pipes = [os.pipe(), os.pipe()] if len(spec["boxes"]) == 2 else []
    pids: dict[int, str] = {}
    for number, entry in enumerate(spec["boxes"]):
        standard = [null if entry.get(name) is None else entry[name] for name in ("stdin", "stdout", "stderr")]
        links = [pipes[number][0], pipes[1 - number][1]] if pipes else [None, None]
        descriptors = [*standard, entry["job"], *links, entry.get("verdict"), errors_out]
        pids[box.start(spec, entry["role"], descriptors, number)] = entry["role"]
    for descriptor in (errors_out, *(end for pipe in pipes for end in pipe)):
        os.close(descriptor)
    codes, in_time = _wait(pids, spec["boxes"][-1]["role"], started + spec["limits"]["wall_seconds"])
    _end([pid for pid, role in pids.items() if role not in codes])  # the id of a process that has ended may be in use again
    # Reading does not block: all processes that could write have ended, or closed the pipe.
    errors = os.read(errors_in, 4096).decode(errors="replace").strip()
    return {"in_time": in_time, "endings": {role: box.describe_ending(code) for role, code in codes.items()}, "error": errors}


def _wait(pids: dict[int, str], last: str, deadline: float) -> tuple[dict[str, int], bool]:
    """Wait until the box of the role `last` has ended; returns the exit codes by role, and whether it ended in time."""
    codes: dict[str, int] = {}
    while last not in codes:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            codes[pids[pid]] = os.waitstatus_to_exitcode(status)
        elif pid == 0:
            left = deadline - time.monotonic()
            if left <= 0 or signal.sigtimedwait({signal.SIGCHLD}, left) is None:
                return codes, last in codes
    return codes, True


def _end(pids: list[int]) -> None:
    """Kill all boxes; this process is the parent of all processes that they leave, and waits for them.

    A box dies with the process that waits for it, unless that process is killed while the box is still being set up, or a program
    without isolation has started processes. So remaining children are found and killed as well.
    """
    left = pids
    with suppress(ChildProcessError):
        while True:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0] or signal.sigtimedwait({signal.SIGCHLD}, _PATIENCE_S):
                pass
            left = _children()


def _children() -> list[int]:
    """Process ids of the children of this process."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as stream:
            if int(stream.read().rpartition(b")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found
