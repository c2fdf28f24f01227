"""Replace a file or a folder, so that at every moment the old or the new one is complete.

Replacing a folder takes two renames. Between them the old folder exists only as `replaced_path`; `checkpoint_exists` reports
this.

A file that is being written or removed is next to its final place, under a name that nothing takes for a checkpoint.
"""

import os
import shutil
import sys
from pathlib import Path


def unfinished_path(path: Path) -> Path:
    """Path for writing what will become `path`; a process that is killed meanwhile leaves an unfinished file there."""
    return path.with_name(f".{path.name}.part")


def replaced_path(path: Path) -> Path:
    """Temporary path of the predecessor of `path`: a folder cannot replace another one in one step."""
    return path.with_name(f".{path.name}.replaced")


def put_in_place(path: Path) -> None:
    """Rename `unfinished_path(path)` to `path`; the predecessor is removed once the new one is safe."""
    part, replaced = unfinished_path(path), replaced_path(path)
    if part.is_file() and not path.is_dir():
        part.replace(path)
    else:
        if path.exists() or path.is_symlink():
            discard(replaced)
            path.rename(replaced)
        part.rename(path)
    flush(path.parent)
    discard(part)
    discard(replaced)


def remove(path: Path) -> None:
    """Remove a file or a folder; a folder is renamed first, so that an incomplete one never has its name."""
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
    if sys.platform == "win32":  # Windows opens no folders, and flushes no file that is opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
