"""Restrictions that a process cannot undo: resource limits, another user, no capabilities, and death with its parent."""

import os
import resource
import signal
import struct
from contextlib import suppress

from hybrid_lightning.sandbox import libc

_FIRST_USER, _USERS = 61184, 4336  # the range of systemd's dynamic users, which belong to no person and no other service
OPEN_FILES = 64
STACK_BYTES = 64 * 2**20  # for deep recursion through C code, such as functools.cache


def limit(cpu_seconds: int, memory_bytes: int, file_bytes: int, threads: int) -> None:
    """Set the soft and hard resource limits (see `Limits`); only the stack's hard limit stays unchanged.

    The limit on threads has no effect for root.
    """
    for name, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NPROC, threads),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]  # programs may raise their stack, as many do: it counts as address space
    stack = min(STACK_BYTES, memory_bytes // 4)
    resource.setrlimit(resource.RLIMIT_STACK, (stack if hard == resource.RLIM_INFINITY else min(stack, hard), hard))


def other_user(number: int) -> int | None:
    """Number of the user that a box becomes; None if this process is not root, or may not change its user.

    Pass different numbers for boxes that run at the same time.
    """
    if os.geteuid():
        return None
    with open("/proc/self/status") as stream:
        capabilities = next(int(line.split()[1], 16) for line in stream if line.startswith("CapEff"))
    may_change = all(capabilities >> bit & 1 for bit in (6, 7))  # CAP_SETGID, CAP_SETUID
    user = _FIRST_USER + number % _USERS
    return user if may_change and _has_number("uid", user) and _has_number("gid", user) and _may_set_groups() else None


def _has_number(kind: str, number: int) -> bool:
    """Whether a user or group with this number exists here; a rootless container's user namespace may have only one."""
    with open(f"/proc/self/{kind}_map") as stream:
        ranges = [(int(first), int(count)) for first, _, count in map(str.split, stream)]
    return any(first <= number < first + count for first, count in ranges)


def _may_set_groups() -> bool:
    with open("/proc/self/setgroups") as stream:
        return stream.read().strip() == "allow"


def drop(user: int | None) -> None:
    """Give up root and all capabilities for good, and become the user and group with this number, unless it is None."""
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    libc.call("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("6I", 0, 0, 0, 0, 0, 0))
    # This keeps the host's crash handler from running, if there is one; a limit of 0 on core dumps does not (Linux `core(5)`).
    libc.prctl(libc.PR_SET_DUMPABLE, 0)


def die_with_parent(parent: int | None = None) -> None:
    """Let the kernel kill this process when its parent ends. A later change of user undoes this.

    If the parent is already another process than `parent`, end now (None: the parent's id is not visible).
    """
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def be_killed_first() -> None:
    """Let the kernel kill this process before all others if the machine runs out of memory."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as stream:
        stream.write("1000")
