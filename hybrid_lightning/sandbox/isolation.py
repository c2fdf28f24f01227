"""Which mechanisms isolate a program on this machine, and whether they are enough.

Isolation is enough if a program

- has no network;
- reads only files of the Python installation and the system's libraries;
- writes only into its own temporary folder, or nowhere at all;
- cannot see, signal or trace other processes, and leaves no process behind;
- gets no more CPU time, memory, threads and output than the limits allow.

There are two ways to achieve that, both with a filter of system calls (seccomp):

- namespaces, and Landlock on top if the kernel has it;
- Landlock alone, for containers that forbid namespaces. A program then has no temporary folder.

A program may start threads only if the kernel can limit their number. With Landlock alone, it cannot for a user other than root,
or for a root that may not become another user.

All mechanisms are kernel calls: tools such as bubblewrap are neither needed nor used. A program cannot start processes, so the
memory limit of its one process is the limit of the program; its tests may use the same amount again.
"""

import os
import platform
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hybrid_lightning.errors import SandboxError
from hybrid_lightning.sandbox.launch import Box, Limits, launch, probe

# A program that tries to escape from the sandbox, which runs it at the start. It prints the names of the attempts that succeed.
_ATTEMPTS = """
import os, statistics
def attempt(name, action):
    try:
        action()
    except (OSError, PermissionError):
        return
    print(name)
def write():
    with open({beside!r}, "w") as stream:
        stream.write("written")
def connect():
    import socket
    socket.socket()
attempt("reading a file of this process", lambda: open({secret!r}).read())
attempt("changing a file of this process", lambda: open({secret!r}, "r+").write("changed"))
try:
    write()  # whether this worked is seen from outside: the same path in the program's own root folder does no harm
except OSError:
    pass
attempt("making a process", lambda: os.fork() or os._exit(0))
attempt("opening a socket", connect)
attempt("signalling another process", lambda: os.kill({parent}, 0))
print("done")
"""


@dataclass(frozen=True)
class Isolation:
    """How programs are isolated on this machine."""

    mechanisms: tuple[str, ...]  # mechanisms that work and are used
    missing: tuple[str, ...]  # the other mechanisms, each with the reason why it does not work

    @property
    def is_enough(self) -> bool:
        """Whether untrusted programs may run."""
        return "seccomp" in self.mechanisms and ("namespaces" in self.mechanisms or "landlock" in self.mechanisms)


def require_isolation(allow_without_isolation: bool = False) -> Isolation:
    """Find out how programs can be isolated on this machine, and test that they cannot escape.

    Args:
        allow_without_isolation: Whether programs may run even if the isolation is not enough.

    Raises:
        SandboxError: If the isolation is not enough and that is not allowed, or if a program escapes in the test.
    """
    if platform.system() != "Linux":
        raise SandboxError(
            f"programs of a model cannot be isolated on {platform.system()}: the sandbox needs Linux; train on Linux, in a "
            "container or in a virtual machine, or use a reward that runs no code"
        )
    isolation = _found()
    if not isolation.is_enough and not allow_without_isolation:
        raise SandboxError(
            f"programs of a model cannot be isolated on this machine ({'; '.join(isolation.missing)}); it needs seccomp, and "
            "either user namespaces (sysctl user.max_user_namespaces above 0, kernel.unprivileged_userns_clone=1, "
            "kernel.apparmor_restrict_unprivileged_userns=0) or Landlock of Linux 6.2 or later; in a container, allow these "
            "system calls; allow_without_isolation=true runs programs with only the available mechanisms and all permissions of "
            "this user"
        )
    escaped = _try(isolation)
    if isolation.is_enough and escaped:
        raise SandboxError(
            f"the sandbox of {', '.join(isolation.mechanisms)} is not secure on this machine: a program succeeded in {escaped}; "
            "use another machine, and report this"
        )
    return isolation


@cache
def _found() -> Isolation:
    reasons = probe()
    return Isolation(
        tuple(name for name, reason in reasons.items() if not reason),
        tuple(f"{name}: {reason}" for name, reason in reasons.items() if reason),
    )


@cache
def _try(isolation: Isolation) -> str:
    """Run a program that tries to escape, in the same way as all programs; returns the attempts that succeeded.

    Raises:
        SandboxError: If no program runs at all.
    """
    with tempfile.TemporaryDirectory(prefix="sandbox_") as folder:
        secret, beside = Path(folder, "secret"), Path(folder, "beside")
        secret.write_text("secret")
        for path, mode in ((Path(folder), 0o777), (secret, 0o666)):  # the sandbox must stop a program, not file permissions
            path.chmod(mode)
        source = _ATTEMPTS.format(secret=str(secret), beside=str(beside), parent=os.getpid())
        ran = launch([Box("script", {"setup": "", "source": source})], isolation.mechanisms, Limits())
        lines = ran.stdout.decode(errors="replace").splitlines()
        if lines[-1:] != ["done"]:
            raise SandboxError(
                f"no program runs in the sandbox of {', '.join(isolation.mechanisms) or 'nothing'}: "
                f"{ran.last_error or ran.endings}; use a Python that any user may read (not one under /root)"
            )
        changed = ["writing outside"] if beside.exists() or secret.read_text() != "secret" else []
        return ", ".join(changed + lines[:-1])
