"""System calls that the standard library of Python 3.11 does not offer, through ctypes."""

import ctypes
import os

_LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
_M_ARENA_MAX = -8


def call(function: str, *arguments: int | bytes | None) -> int:
    """Call a function of libc that returns a negative number on error.

    Raises:
        OSError: If the function fails; the message has its name.
    """
    converted = [ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value) for value in arguments]
    result = getattr(_LIBC, function)(*converted)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{function}: {os.strerror(error)}")
    return int(result)


def syscall(number: int, *arguments: int | bytes | None) -> int:
    """Make a system call by its number."""
    return call("syscall", number, *arguments)


def prctl(option: int, value: int, extra: bytes | None = None) -> None:
    """Change a setting of this process."""
    call("prctl", option, value, extra, 0, 0)


def share_memory_between_threads() -> None:
    """Let all threads allocate from one arena: by default glibc reserves 64 MiB of address space for each thread."""
    if hasattr(_LIBC, "mallopt"):
        _LIBC.mallopt(_M_ARENA_MAX, 1)
