"""Put a file or a folder in the place of another, so that one of the two is there whole at every moment.

What is being written lies beside its place under a name that nothing takes for a checkpoint; so does what is being removed.
"""

import ctypes
import errno
import os
import shutil
from pathlib import Path

_FROM_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}  # what systems say that cannot exchange


def part_of(path: Path) -> Path:
    """Where to write what shall become `path`, and what a process leaves there if it is killed meanwhile."""
    return path.with_name(f".{path.name}.part")


def replaced_by(path: Path) -> Path:
    """Where the predecessor of `path` lies for a moment, on systems that cannot exchange two names in one step."""
    return path.with_name(f".{path.name}.replaced")


def put_in_place(path: Path) -> None:
    """Give `part_of(path)` its name. What had the name before goes once the new one is safe."""
    part, replaced = part_of(path), replaced_by(path)
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
    """Remove a file or a folder, whose name is gone before the first of what it holds."""
    if path.is_dir() and not path.is_symlink():
        part = part_of(path)
        discard(part)
        path.rename(part)
        path = part
    discard(path)


def discard(path: Path) -> None:
    """Remove whatever is there, if anything is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_FROM_HERE, os.fsencode(one), _FROM_HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(other))
