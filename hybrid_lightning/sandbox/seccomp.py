"""The filter of system calls: an allow-list as a BPF program (Linux `Documentation/userspace-api/seccomp_filter.rst`)."""

import ctypes
import errno
import os
import platform
import struct

from hybrid_lightning.sandbox import libc, syscalls

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; an argument is 8 bytes, its low half first
_X32 = 0x40000000  # system calls of the x32 ABI have this bit, and numbers that an allow-list of x86_64 would misread


def build(machine: str, pid: int, threads: bool) -> bytes:
    """Assemble the filter.

    Args:
        machine: As `platform.machine()` says.
        pid: Process id, in its own namespace, to which alone signals may be sent.
        threads: Whether threads may be started.

    Raises:
        OSError: If the system calls of this machine type are not known.
    """
    if machine not in syscalls.AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"no table of system calls for machine type {machine}")
    column = list(syscalls.AUDIT_ARCH).index(machine)
    refuse = [(_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    program = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, syscalls.AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for numbers in syscalls.ALLOWED.values():
        number = numbers[column]
        if number is not None:
            program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for call, argument, values in (
        (syscalls.FCNTL, 1, syscalls.FCNTL_COMMANDS),
        (syscalls.IOCTL, 1, syscalls.IOCTL_REQUESTS),
        (syscalls.KILL, 0, (pid,)),
        (syscalls.TGKILL, 0, (pid,)),
        (syscalls.PRLIMIT64, 0, (0,)),
    ):
        checks = [step for value in values for step in ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW))]
        block = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument), *checks, *refuse]
        program += [(_EQUAL, 0, len(block), call[column]), *block]
    if threads:  # what is no thread is a process
        block = [
            (_LOAD, 0, 0, _ARGUMENTS),
            (_ANY_BIT, 0, 1, syscalls.CLONE_THREAD),
            (_RETURN, 0, 0, _ALLOW),
            *refuse,
        ]
        program += [(_EQUAL, 0, len(block), syscalls.CLONE[column]), *block]
    # Its flags lie in memory, where a filter cannot look: libc falls back on clone if there is no clone3.
    program += [(_EQUAL, 0, 1, syscalls.CLONE3[column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    program += refuse
    return b"".join(struct.pack("HBBI", *step) for step in program)


def install(threads: bool) -> None:
    """Filter the system calls of this process from now on; needs `PR_SET_NO_NEW_PRIVS`, and cannot be undone."""
    code = build(platform.machine(), os.getpid(), threads)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    libc.prctl(libc.PR_SET_SECCOMP, 2, program)
