"""Replace a file or a folder by another one, so that at every moment one of the two is complete.

A file that is being written, or removed, is beside its final place, under a name that nothing takes for a checkpoint.
"""

import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path

_FROM_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}  # errors of systems that cannot exchange names


def unfinished_path(path: Path) -> Path:
    """Where to write what will become `path`. A process that is killed meanwhile leaves an unfinished file there."""
    return path.with_name(f".{path.name}.part")


def replaced_path(path: Path) -> Path:
    """Where the predecessor of `path` is for a moment, on systems that cannot exchange two names in one step."""
    return path.with_name(f".{path.name}.replaced")


def put_in_place(path: Path) -> None:
    """Rename `unfinished_path(path)` to `path`. What had the name before is removed once the new one is safe."""
    part, replaced = unfinished_path(path), replaced_path(path)
    there = path.exists() or path.is_symlink()
    if part.is_file() and not path.is_dir():
        part.replace(path)
    elif there and not _exchange(part, path):
        discard(replaced)
        path.rename(replaced)
        part.rename(path)
    elif not there:
        part.rename(path)
    flush(path.parent)
    discard(part)
    discard(replaced)


def remove(path: Path) -> None:
    """Remove a file or a folder. A folder is renamed first, so that an incomplete one never has its name."""
    if path.is_dir() and not path.is_symlink():
        part = unfinished_path(path)
        discard(part)
        path.rename(part)
        path = part
    discard(path)


def discard(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    if sys.platform == "win32":  # which opens no folders, and flushes no file that is opened to be read
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; returns False if the system or the file system cannot."""
    rename = None if sys.platform == "win32" else getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_FROM_HERE, os.fsencode(one), _FROM_HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(other))
