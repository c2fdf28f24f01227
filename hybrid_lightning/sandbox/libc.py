"""System calls that the standard library of Python 3.11 does not offer, by ctypes."""

import ctypes
import os

_LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38


def call(function: str, *arguments: int | bytes | None) -> int:
    """Call a function of libc that returns a negative number on error.

    Raises:
        OSError: On error, with the function's name.
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
