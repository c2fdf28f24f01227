"""The filter of system calls: an allow-list as a BPF program (Linux `Documentation/userspace-api/seccomp_filter.rst`).

Everything else is denied: sockets, processes, exec, ptrace, mounts, keys, bpf, io_uring, userfaultfd, memfd, changes of modes,
owners and times of files, and whatever future kernels add. The call numbers are from Linux's `asm/unistd_64.h` and
`asm-generic/unistd.h`.
"""

import ctypes
import errno
import os
import platform
import struct

from hybrid_lightning.sandbox import libc

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Name, number on x86_64, number on aarch64; - if the machine type has no such call.
_TABLE = """
# files; the root folder and Landlock decide which ones
read 0 63; write 1 64; readv 19 65; writev 20 66; pread64 17 67; pwrite64 18 68; open 2 -; openat 257 56; close 3 57;
lseek 8 62; stat 4 -; fstat 5 80; lstat 6 -; newfstatat 262 79; statx 332 291; access 21 -; faccessat 269 48;
faccessat2 439 439; getdents64 217 61; getcwd 79 17; chdir 80 49; mkdir 83 -; mkdirat 258 34; rmdir 84 -; unlink 87 -;
unlinkat 263 35; rename 82 -; renameat 264 38; renameat2 316 276; readlink 89 -; readlinkat 267 78; ftruncate 77 46;
fsync 74 82; fdatasync 75 83; dup 32 23; dup2 33 -; dup3 292 24; pipe 22 -; pipe2 293 59; poll 7 -; ppoll 271 73;
select 23 -; pselect6 270 72; epoll_create1 291 20; epoll_ctl 233 21; epoll_wait 232 -; epoll_pwait 281 22; umask 95 166;
# memory
mmap 9 222; munmap 11 215; mremap 25 216; mprotect 10 226; madvise 28 233; brk 12 214;
# this process and its threads
exit 60 93; exit_group 231 94; getpid 39 172; gettid 186 178; getppid 110 173; getuid 102 174; geteuid 107 175;
getgid 104 176; getegid 108 177; getgroups 115 158; getresuid 118 148; getresgid 120 150; getpgrp 111 -; getpgid 121 155;
getsid 124 156; times 100 153; getrusage 98 165; getrlimit 97 163; setrlimit 160 164; sysinfo 99 179; uname 63 160;
sched_yield 24 124; sched_getaffinity 204 123; set_robust_list 273 99; rseq 334 293; set_tid_address 218 96;
arch_prctl 158 -; futex 202 98; wait4 61 260; waitid 247 95;
# time, random numbers, signals within the process
nanosleep 35 101; clock_nanosleep 230 115; clock_gettime 228 113; clock_getres 229 114; gettimeofday 96 169; time 201 -;
getrandom 318 278; rt_sigaction 13 134; rt_sigprocmask 14 135; rt_sigreturn 15 139; rt_sigtimedwait 128 137;
rt_sigsuspend 130 133; rt_sigpending 127 136; sigaltstack 131 132; pause 34 -; alarm 37 -; setitimer 38 103;
getitimer 36 102; restart_syscall 219 128;
"""
ALLOWED = [entry.split() for line in _TABLE.splitlines() if line[:1] != "#" for entry in line.split(";") if entry.strip()]
# Calls that are allowed or denied by an argument.
FCNTL, IOCTL = (72, 25), (16, 29)
KILL, TGKILL, PRLIMIT64 = (62, 129), (234, 131), (302, 261)
CLONE, CLONE3 = (56, 220), (435, 435)
# fcntl: duplicate, flags and locks; not F_SETOWN and F_SETSIG, which make the kernel send signals to other processes.
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
# ioctl: whether a file is a terminal, the size of a terminal, close-on-exec and non-blocking.
IOCTL_REQUESTS = (0x5401, 0x5413, 0x5450, 0x5451, 0x5421)
CLONE_THREAD = 0x10000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; an argument has 8 bytes, the low half first
_X32 = 0x40000000  # bit of system calls of the x32 ABI; its numbers mean other calls than on x86_64


def install(threads: bool) -> None:
    """Filter the system calls of this process from now on; needs `PR_SET_NO_NEW_PRIVS`, and cannot be undone."""
    code = build(platform.machine(), os.getpid(), threads)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    libc.prctl(libc.PR_SET_SECCOMP, 2, program)


def build(machine: str, pid: int, threads: bool) -> bytes:
    """Assemble the filter for a machine type, as `platform.machine()` returns it.

    Signals may be sent only to `pid`, an id in the process's own namespace; `threads` allows threads to be started.

    Raises:
        OSError: If the machine type has no table of system calls.
    """
    if machine not in AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"no table of system calls for machine type {machine}")
    column = list(AUDIT_ARCH).index(machine)
    refuse = [(_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    program = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for entry in ALLOWED:
        if entry[1 + column] != "-":
            program += [(_EQUAL, 0, 1, int(entry[1 + column])), (_RETURN, 0, 0, _ALLOW)]
    for call, argument, values in (
        (FCNTL, 1, FCNTL_COMMANDS),
        (IOCTL, 1, IOCTL_REQUESTS),
        (KILL, 0, (pid,)),
        (TGKILL, 0, (pid,)),
        (PRLIMIT64, 0, (0,)),
    ):
        checks = [step for value in values for step in ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW))]
        block = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument), *checks, *refuse]
        program += [(_EQUAL, 0, len(block), call[column]), *block]
    if threads:  # clone may make a thread, but not a process
        block = [(_LOAD, 0, 0, _ARGUMENTS), (_ANY_BIT, 0, 1, CLONE_THREAD), (_RETURN, 0, 0, _ALLOW), *refuse]
        program += [(_EQUAL, 0, len(block), CLONE[column]), *block]
    # The flags of clone3 are in memory, which a filter cannot read. If the call does not exist, libc falls back on clone.
    program += [(_EQUAL, 0, 1, CLONE3[column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    program += refuse
    return b"".join(struct.pack("HBBI", *step) for step in program)
