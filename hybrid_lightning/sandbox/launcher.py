"""The process that starts the boxes of one program, waits for them and ends them; new for each, so that it remembers nothing."""

# What programs and tests use most is loaded before the boxes are forked, once for both; much of it is used here nowhere.
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
from contextlib import suppress
from typing import Any

from hybrid_lightning.sandbox import box, libc, privileges, probes

_PATIENCE_S = 0.1  # for boxes to die by themselves


def main() -> None:
    """Run what the first argument asks for, JSON.

    Its keys: `parent` (process id), `probe` (true to report which mechanisms work, and nothing else), `report` (descriptor to
    write the outcome to), `mechanisms`, `readable`, `packages`, `limits`, `boxes` (list of `role`, `stdin`, `stdout`, `stderr`,
    `job`, `verdict`; descriptors, or null for /dev/null).
    """
    spec = json.loads(sys.argv[1])
    privileges.die_with_parent(spec["parent"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a trainer that ignores it would hide how boxes end
    outcome = probes.run(spec["readable"]) if spec.get("probe") else _run(spec)
    os.pwrite(spec["report"], json.dumps(outcome).encode(), 0)


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
    _end([pid for pid, role in pids.items() if role not in codes])  # the number of one that was reaped may be another's by now
    # All who could write are dead, or have closed their end.
    errors = os.read(errors_in, 4096).decode(errors="replace").strip()
    return {"in_time": in_time, "endings": {role: box.describe(code) for role, code in codes.items()}, "error": errors}


def _wait(pids: dict[int, str], last: str, deadline: float) -> tuple[dict[str, int], bool]:
    """Exit codes by role, as soon as the last role has ended, and whether that was in time."""
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
    """Kill all boxes; this process inherits and reaps all that is left.

    A box dies with the process that waits for it, unless that is killed while the box is still being set up, or a program without
    isolation has made processes: so what does not die is looked for.
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
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as stream:
            if int(stream.read().rpartition(b")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found
