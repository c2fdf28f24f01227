"""A box: a process with access only to the given resources, and the process that waits for it."""

import _sitebuiltins
import builtins
import fcntl
import io
import json
import os
import signal
import sys
from importlib import machinery, util
from typing import Any

from hybrid_lightning.sandbox import candidate, harness, landlock, libc, namespaces, privileges, seccomp

# File descriptors in a box. 0 to 2 are the standard streams. Then come its job, two pipes to the other box, and two files: the
# verdict, which only the tests write, and a report of errors, which only the set-up of a box writes.
JOB, REPLIES_OR_REQUESTS_IN, OUT, VERDICT, REPORT = 3, 4, 5, 6, 7
_SETUP_FAILED, _OUT_OF_TIME, _SIGNALLED = 125, 124, 128


def start(spec: dict[str, Any], role: str, descriptors: list[int | None], number: int) -> int:
    """Start a box; returns the id of the process that waits for it. Its exit code is explained by `describe_ending`.

    Args:
        spec: See `launcher.main`.
        role: "candidate", "tests", "script" or "cells".
        descriptors: File descriptors that become 0 to 7 in the box; None for a closed one.
        number: Number of the box, so that different boxes run as different users.
    """
    launcher = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    try:
        _place(descriptors)
    except BaseException:
        os._exit(_SETUP_FAILED)  # the descriptor for a reason does not exist yet
    try:
        privileges.die_with_parent(launcher)
        root = os.geteuid() == 0
        if "namespaces" in spec["mechanisms"]:
            namespaces.unshare()
        user = privileges.other_user(launcher * 2 + number)
        inner = os.fork()
        if inner == 0:
            privileges.be_killed_first()
            _confine(spec, user, threads=user is not None or ("namespaces" in spec["mechanisms"] and not root))
            with open(JOB, "rb") as stream:
                job: dict[str, Any] = json.load(stream)
    except BaseException as error:
        os.write(REPORT, f"{type(error).__name__}: {error}\n".encode())
        os._exit(_SETUP_FAILED)
    if inner:
        os.closerange(0, REPORT + 1)
        _wait(inner, spec["limits"]["cpu_seconds"])
    _run(role, job)
    sys.exit(0)


def describe_ending(code: int) -> str:
    """Describe how a box ended, from the exit code of the process that waited for it; empty if it ended normally."""
    if code == _OUT_OF_TIME:
        return "out of CPU time"
    if code > _SIGNALLED:
        return f"ended by signal {code - _SIGNALLED}"
    return "" if code == 0 else "could not be set up" if code == _SETUP_FAILED else "ended with an error"


def _place(descriptors: list[int | None]) -> None:
    """Move the descriptors to their numbers, and close all others."""
    high = [None if source is None else fcntl.fcntl(source, fcntl.F_DUPFD, 64) for source in descriptors]
    for number, source in enumerate(high):
        if source is None:
            os.closerange(number, number + 1)  # closes it whether or not it is open
        else:
            os.dup2(source, number)
    os.closerange(len(high), 2**20)


def _confine(spec: dict[str, Any], user: int | None, threads: bool) -> None:
    """Apply every mechanism to this process, and let it become another user, unless `user` is None.

    Threads are allowed if the system limits their number: in a user namespace or for a separate user, never for root.
    """
    mechanisms, limits = spec["mechanisms"], spec["limits"]
    within = tuple(f"{path}/" for path in spec["readable"])
    readable = [*spec["readable"], *(path for path in spec["packages"] if not path.startswith(within))]
    writable = []
    if "namespaces" in mechanisms:
        namespaces.change_root(readable, limits["temporary_bytes"])
        writable = [namespaces.TEMPORARY]
    elif "landlock" in mechanisms:
        os.chdir("/")
    if spec["packages"]:
        sys.meta_path.append(_Packages(spec["packages"]))
    privileges.drop(user)
    privileges.die_with_parent()
    if "landlock" in mechanisms:
        landlock.restrict(readable, writable)
    os.environ.clear()
    if spec["packages"]:
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # without it numpy starts a thread for each processor
    libc.share_memory_between_threads()
    privileges.limit(limits["cpu_seconds"], limits["memory_bytes"], limits["file_bytes"], limits["threads"])
    if "seccomp" in mechanisms:
        seccomp.install(threads)


def _run(role: str, job: dict[str, Any]) -> None:
    """Run the program or the tests of the box."""
    os.close(REPORT)
    if role == "tests":
        os.write(VERDICT, json.dumps(harness.run_tests(job, OUT, REPLIES_OR_REQUESTS_IN)).encode())
        os._exit(0)
    sys.stdin = _stream(0, "r", "surrogateescape")
    sys.stdout = _stream(1, "w", "surrogateescape")
    sys.stderr = _stream(2, "w", "backslashreplace")
    sys.argv = ["solution.py"]
    for name in ("exit", "quit"):  # Python's module `site`, which defines these, is not loaded here
        setattr(builtins, name, _sitebuiltins.Quitter(name, "end of file"))
    if role == "candidate":
        candidate.run_function(job["setup"], job["source"], job["tested"], REPLIES_OR_REQUESTS_IN, OUT)
    if role == "cells":
        candidate.run_cells(job["cells"], job["seed"])
    candidate.run_script(job["setup"], job["source"])


def _stream(descriptor: int, mode: str, errors: str) -> io.TextIOWrapper:
    binary = open(descriptor, mode + "b", closefd=False)  # noqa: SIM115  (open as long as the program runs)
    return io.TextIOWrapper(binary, encoding="utf-8", errors=errors)


def _wait(pid: int, cpu_seconds: int) -> None:
    """Wait for the box, and end with an exit code that describes how it ended."""
    _, status, usage = os.wait4(pid, 0)
    used = usage.ru_utime + usage.ru_stime
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        os._exit(_OUT_OF_TIME if number == signal.SIGKILL and used > cpu_seconds - 0.5 else _SIGNALLED + number)
    os._exit(min(os.WEXITSTATUS(status), 1))  # the program's exit codes must not be mistaken for ours


class _Packages:
    """An import finder for packages by their own paths, so that their parent folders are neither read nor importable."""

    def __init__(self, paths: list[str]) -> None:
        self.folders: dict[str, list[str]] = {}  # a package without __init__ may have several folders
        self.files: dict[str, str] = {}
        suffixes = [*machinery.EXTENSION_SUFFIXES, *machinery.SOURCE_SUFFIXES, *machinery.BYTECODE_SUFFIXES]  # as Python prefers
        for path in paths:
            name, _, kind = os.path.basename(path).partition(".")
            if os.path.isdir(path):
                if not kind:  # a name with a dot is the folder of a package's shared libraries
                    self.folders.setdefault(name, []).append(path)
                    begins = [f"{path}/__init__{suffix}" for suffix in suffixes]
                    self.files.update([(name, begin) for begin in begins if os.path.exists(begin)][:1])
            else:
                self.files[name] = path

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> machinery.ModuleSpec | None:
        """Find a module for the import system, as an entry of `sys.meta_path` must."""
        folders = self.folders.get(name)
        if name in self.files:
            return util.spec_from_file_location(name, self.files[name], submodule_search_locations=folders)
        if folders is None:
            return None
        spec = machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = folders
        return spec
