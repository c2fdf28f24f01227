"""What one program may use.

Starts the launcher of one program, waits for it, and reads what its boxes left.
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


@dataclass(frozen=True)
class Limits:
    """Limits of one program; its tests, in a process of their own, have the same.

    Raises:
        ConfigError: If a limit is too low for any program, or no number.
    """

    cpu_seconds: int = 5  # CPU time; whole seconds, as the kernel counts
    wall_seconds: float = 10.0  # from start to end, waiting included
    memory_bytes: int = 512 * 2**20  # address space
    file_bytes: int = 4 * 2**20  # size of any file, and of what it prints
    temporary_bytes: int = 16 * 2**20  # of all files together
    threads: int = 32

    def __post_init__(self) -> None:
        least = {
            "cpu_seconds": 1,
            "wall_seconds": 0.1,
            "memory_bytes": 128 * 2**20,
            "file_bytes": 2**10,
            "temporary_bytes": 2**16,
            "threads": 1,
        }
        for name, value in self.as_dict().items():
            if isinstance(value, bool) or not least[name] <= value < float("inf"):
                raise ConfigError(f"{name}={value}: give a number of at least {least[name]}")
            if name != "wall_seconds" and value != int(value):
                raise ConfigError(f"{name}={value}: give a whole number")

    def as_dict(self) -> dict[str, float]:
        """The limits by name."""
        return asdict(self)


_GRACE_S = 10.0  # beyond the program's own time: to start, on a busy machine, and to clean up
_PAUSE_S = 1.0
_ROOT = str(Path(__file__).parents[2])
_COMMAND = f"import sys; sys.path.append({_ROOT!r}); from hybrid_lightning.sandbox.launcher import main; sys.path.pop(); main()"


@dataclass(frozen=True)
class Box:
    """What runs in a box."""

    role: str  # "candidate", "tests" or "script"
    job: dict[str, Any]  # JSON that it reads once it is confined
    stdin: bytes | None = None  # None: empty


@dataclass(frozen=True)
class Ran:
    """How a launch went."""

    in_time: bool  # whether it ended within `Limits.wall_seconds`
    endings: dict[str, str]  # role -> how it ended, empty if well
    verdict: bytes  # what the box "tests" wrote as its verdict
    stdout: bytes  # of the box "script"
    stderr: bytes  # likewise


@cache
def readable_files() -> tuple[str, ...]:
    """The Python installation without further packages of a virtual environment, and the system's libraries."""
    prefixes = {sys.base_prefix, sys.base_exec_prefix}
    paths = {f"{prefix}/{folder}" for prefix in prefixes for folder in ("lib", "lib64")}
    paths |= {str(Path(os.__file__).parent), "/lib", "/lib64", "/usr/lib", "/usr/lib64"}
    outer = [path for path in paths if not any(path.startswith(f"{other}/") for other in paths)]
    return (*sorted(outer), "/etc/ld.so.cache")


def launch(boxes: Sequence[Box], mechanisms: Sequence[str], limits: Limits, packages: Sequence[str] = ()) -> Ran:
    """Run one program in its boxes.

    Args:
        boxes: A script; or a candidate and its tests, which are connected by two pipes.
        mechanisms: Of isolation, those of "namespaces", "landlock" and "seccomp" that are to be used.
        limits: Of each box.
        packages: Files and folders that may be imported from beside the standard library (see `find_packages`).

    Raises:
        SandboxError: If the boxes cannot be made, twice, which says nothing about the program.
    """
    try:
        return _launch(boxes, mechanisms, limits, packages)
    except SandboxError:  # hours of training should not end because the machine was short of something for a moment
        time.sleep(_PAUSE_S)
        return _launch(boxes, mechanisms, limits, packages)


def _launch(boxes: Sequence[Box], mechanisms: Sequence[str], limits: Limits, packages: Sequence[str]) -> Ran:
    with ExitStack() as stack:

        def file(content: bytes = b"") -> int:
            descriptor = os.memfd_create("sandbox")
            stack.callback(os.close, descriptor)
            with open(descriptor, "wb", closefd=False) as stream:
                stream.write(content)
            os.lseek(descriptor, 0, os.SEEK_SET)
            return descriptor

        entries: list[dict[str, Any]] = []
        for box in boxes:
            entry: dict[str, Any] = {"role": box.role, "job": file(json.dumps(box.job).encode())}
            if box.stdin is not None:
                entry["stdin"] = file(box.stdin)
            if box.role == "script":
                entry |= {"stdout": file(), "stderr": file()}
            if box.role == "tests":
                entry["verdict"] = file()
            entries.append(entry)
        spec = {"mechanisms": list(mechanisms), "limits": limits.as_dict(), "boxes": entries, "packages": list(packages)}
        outcome = _start(spec, file(), file(), limits.wall_seconds + _GRACE_S)
        if outcome["error"] or "could not be set up" in outcome["endings"].values():
            said = outcome["error"] or outcome["endings"]
            raise SandboxError(f"the sandbox cannot be set up: {said}; see whether the system runs short of memory or processes")
        last = entries[-1]
        verdict, stdout, stderr = (_content(last.get(name), int(limits.file_bytes)) for name in ("verdict", "stdout", "stderr"))
        return Ran(outcome["in_time"], outcome["endings"], verdict, stdout, stderr)


def probe() -> dict[str, str]:
    """Mechanism -> why it does not work on this machine, empty if it does.

    Raises:
        SandboxError: If not even the launcher runs.
    """
    report, errors = os.memfd_create("report"), os.memfd_create("errors")
    try:
        return {str(name): str(reason) for name, reason in _start({"probe": True}, report, errors, 30.0).items()}
    finally:
        os.close(report)
        os.close(errors)


def _start(spec: dict[str, Any], report: int, errors: int, timeout_s: float) -> dict[str, Any]:
    """Run a launcher and read its report."""
    spec = {**spec, "parent": os.getpid(), "report": report, "readable": readable_files()}
    boxes = spec.get("boxes", [])
    passed = [report, *(value for entry in boxes for value in entry.values() if isinstance(value, int))]
    # Nothing of this process's environment: it may hold keys. A fixed hash seed: the same program gets the same order of a set.
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
        raise SandboxError(f"the sandbox's launcher cannot be started: {error}") from error
    try:
        handle = os.pidfd_open(process.pid)
        try:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll(timeout_s * 1000)
        finally:
            os.close(handle)
    finally:
        with suppress(ProcessLookupError):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # all boxes are in its group, and cannot leave it
        process.wait()
    text = _content(report, 2**20)
    if not text:
        said = _content(errors, 2**20).decode(errors="replace").strip().splitlines()
        raise SandboxError(
            f"the sandbox's launcher ended without a report (exit code {process.returncode}): "
            f"{said[-1] if said else 'it said nothing'}; see whether the system runs short of memory or processes"
        )
    return dict(json.loads(text))


def _content(descriptor: int | None, limit: int) -> bytes:
    return b"" if descriptor is None else os.pread(descriptor, limit, 0)
