"""Landlock: the kernel denies access to files, TCP and signals, except where rules allow it.

See Linux's `Documentation/userspace-api/landlock.rst`.
"""

import errno
import os
import struct
from collections.abc import Iterable
from contextlib import suppress

from hybrid_lightning.sandbox import libc

MINIMUM_ABI = 3  # earlier versions cannot forbid to truncate files

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG = 2, 4, 8, 16, 32, 128, 256
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_FILE_RIGHTS = {3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}  # ABI -> all rights over files that it has
_READ = _READ_FILE | _READ_DIR
_NULL = _READ_FILE | _WRITE_FILE | _TRUNCATE  # rights over /dev/null
_WRITE = _READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER | _TRUNCATE


def restrict(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Restrict this process to the given files and folders (with their contents); missing paths are ignored.

    Needs `PR_SET_NO_NEW_PRIVS`, and cannot be undone. In `writable` folders, files may also be created, changed and removed.

    Raises:
        OSError: If Landlock is missing, or its version is below `MINIMUM_ABI`.
    """
    version = 0  # if the kernel has no Landlock, or it is switched off
    with suppress(OSError):
        version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < MINIMUM_ABI:
        raise OSError(errno.ENOSYS, f"Landlock ABI {version}; needs {MINIMUM_ABI} (Linux 6.2), switched on at boot")
    # Every handled right is forbidden unless a rule below allows it: all rights over files, TCP bind and connect, signals
    # and abstract sockets to processes outside.
    handled = struct.pack("QQQ", _FILE_RIGHTS[min(version, 5)], 3, 3)
    ruleset = libc.syscall(_CREATE_RULESET, handled, 8 if version < 4 else 16 if version < 6 else 24, 0)
    for paths, rights in ((readable, _READ), (writable, _WRITE), ([os.devnull], _NULL)):
        for path in paths:
            if not os.path.exists(path):
                continue
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = rights if os.path.isdir(path) or rights == _NULL else _READ_FILE
            libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, opened), 0)
            os.close(opened)
    libc.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
