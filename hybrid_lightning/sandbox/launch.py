"""Run one program: start its launcher process, wait for it, and read the output of its boxes.

The launcher receives a description in JSON (see `launcher.main`), and files in memory for all input and output.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hybrid_lightning.errors import ConfigError, SandboxError

_GRACE_S = 10.0  # extra seconds for the launcher to start on a busy machine and to clean up
_PAUSE_S = 1.0  # seconds before a second attempt
_ROOT = str(Path(__file__).parents[2])
_COMMAND = f"import sys; sys.path.append({_ROOT!r}); from hybrid_lightning.sandbox.launcher import main; sys.path.pop(); main()"


@dataclass(frozen=True)
class Limits:
    """Limits of one program; its tests, in a separate process, have the same limits.

    Raises:
        ConfigError: If a limit is too low for any program, or not a number.
    """

    cpu_seconds: int = 5  # CPU time in whole seconds, as the kernel counts it
    wall_seconds: float = 10.0  # time from start to end, waiting included
    memory_bytes: int = 512 * 2**20  # address space
    file_bytes: int = 4 * 2**20  # size of any file, and of the output
    temporary_bytes: int = 16 * 2**20  # size of all temporary files together
    threads: int = 32  # number of threads

    def __post_init__(self) -> None:
        least = {"cpu_seconds": 1, "wall_seconds": 0.1, "memory_bytes": 128 * 2**20}
        least |= {"file_bytes": 2**10, "temporary_bytes": 2**16, "threads": 1}
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not least[name] <= value < float("inf"):
                raise ConfigError(f"{name}={value}; give a number of at least {least[name]}")
            if name != "wall_seconds" and value != int(value):
                raise ConfigError(f"{name}={value}; give a whole number")


@dataclass(frozen=True)
class Box:
    """The content of a box."""

    role: str  # "candidate", "tests", "script" or "cells"
    job: dict[str, Any]  # plain data that the box reads as JSON once it is confined
    stdin: bytes | None = None  # standard input; None for an empty one


@dataclass(frozen=True)
class Ran:
    """The result of a launch."""

    in_time: bool  # whether it ended within `Limits.wall_seconds`
    endings: dict[str, str]  # role -> how the box ended, empty if normally
    verdict: bytes  # verdict of the box "tests"
    stdout: bytes  # standard output of the box "script" or "cells"
    stderr: bytes  # its error output

    @property
    def last_error(self) -> str:
        """The last line of the error output; empty if there is none."""
        return (self.stderr.decode(errors="replace").strip().splitlines() or [""])[-1]


def launch(boxes: Sequence[Box], mechanisms: Sequence[str], limits: Limits, packages: Sequence[str] = ()) -> Ran:
    """Run one program in its boxes.

    Args:
        boxes: One script, the cells of one session, or a candidate and its tests, which are connected by two pipes.
        mechanisms: Mechanisms of isolation to use, from "namespaces", "landlock" and "seccomp".
        limits: Limits of each box.
        packages: Files and folders that may be imported besides the standard library (see `find_packages`).

    Raises:
        SandboxError: If the boxes could not be made in two attempts, for which the program is not to blame.
    """
    try:
        return _launch(boxes, mechanisms, limits, packages)
    except SandboxError:  # a short lack of memory or processes should not end hours of training
        time.sleep(_PAUSE_S)
        return _launch(boxes, mechanisms, limits, packages)


def probe() -> dict[str, str]:
    """Try each mechanism of isolation on this machine; returns its name -> why it does not work, empty if it works.

    Raises:
        SandboxError: If the launcher itself cannot run.
    """
    return {str(name): str(reason) for name, reason in _start({"probe": True}, 30.0).items()}


def _file(stack: ExitStack, content: bytes = b"") -> int:
    """A file in memory, which is closed with the stack."""
    descriptor = os.memfd_create("sandbox")
    stack.callback(os.close, descriptor)
    with open(descriptor, "wb", closefd=False) as stream:
        stream.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _launch(boxes: Sequence[Box], mechanisms: Sequence[str], limits: Limits, packages: Sequence[str]) -> Ran:
    with ExitStack() as stack:
        entries: list[dict[str, Any]] = []
        for box in boxes:
            entry: dict[str, Any] = {"role": box.role, "job": _file(stack, json.dumps(box.job).encode())}
            if box.stdin is not None:
                entry["stdin"] = _file(stack, box.stdin)
            if box.role in ("script", "cells"):
                entry |= {"stdout": _file(stack), "stderr": _file(stack)}
            if box.role == "tests":
                entry["verdict"] = _file(stack)
            entries.append(entry)
        spec = {"mechanisms": list(mechanisms), "limits": asdict(limits), "boxes": entries, "packages": list(packages)}
        outcome = _start(spec, limits.wall_seconds + _GRACE_S)
        if outcome["error"] or "could not be set up" in outcome["endings"].values():
            said = outcome["error"] or outcome["endings"]
            raise SandboxError(f"the sandbox cannot be set up: {said}; check whether the system is out of memory or processes")
        last = entries[-1]
        verdict, stdout, stderr = (_content(last.get(name), int(limits.file_bytes)) for name in ("verdict", "stdout", "stderr"))
        return Ran(outcome["in_time"], outcome["endings"], verdict, stdout, stderr)


def _start(spec: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Run a launcher process and read its report."""
    with ExitStack() as stack:
        report, errors = _file(stack), _file(stack)
        spec = {**spec, "parent": os.getpid(), "report": report, "readable": readable_files()}
        passed = [report, *(value for entry in spec.get("boxes", []) for value in entry.values() if isinstance(value, int))]
        # The environment of this process is not passed on, since it may hold keys. With a fixed hash seed, sets have the same
        # order in every run of a program.
        try:
            process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-X", "utf8", "-c", _COMMAND, json.dumps(spec)],
                env={"PYTHONHASHSEED": "0"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=passed,
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            raise SandboxError(
                f"the sandbox's launcher cannot be started: {error}; check whether the system is out of memory or processes"
            ) from error
        try:
            handle = os.pidfd_open(process.pid)
            stack.callback(os.close, handle)
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll(timeout_s * 1000)
        finally:
            with suppress(ProcessLookupError):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # this ends all boxes: they cannot leave the process group
            process.wait()
        text = _content(report, 2**20)
        if not text:
            said = _content(errors, 2**20).decode(errors="replace").strip().splitlines()
            raise SandboxError(
                f"the sandbox's launcher ended without a report (exit code {process.returncode}): "
                f"{said[-1] if said else 'no output'}; check whether the system is out of memory or processes"
            )
        return dict(json.loads(text))


@cache
def readable_files() -> tuple[str, ...]:
    """Paths of the Python installation, without the packages of a virtual environment, and of the system's libraries."""
    prefixes = {sys.base_prefix, sys.base_exec_prefix}
    paths = {f"{prefix}/{folder}" for prefix in prefixes for folder in ("lib", "lib64")}
    paths |= {str(Path(os.__file__).parent), "/lib", "/lib64", "/usr/lib", "/usr/lib64"}
    outer = [path for path in paths if not any(path.startswith(f"{other}/") for other in paths)]
    return (*sorted(outer), "/etc/ld.so.cache")


def _content(descriptor: int | None, limit: int) -> bytes:
    return b"" if descriptor is None else os.pread(descriptor, limit, 0)
