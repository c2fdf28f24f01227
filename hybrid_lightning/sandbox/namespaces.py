"""Namespaces: no network, no other processes, and a root folder that holds only named files.

They need user namespaces, which require no privilege, or root (Linux `namespaces(7)`, `user_namespaces(7)`).
"""

import os
import struct
from collections.abc import Iterable
from contextlib import suppress

from hybrid_lightning.sandbox import libc

TEMPORARY = "/tmp"  # within the new root folder

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_ALL = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_MOUNT_SETATTR, _AT_EMPTY_PATH, _AT_RECURSIVE, _PIVOT_ROOT = 442, 0x1000, 0x8000, {"x86_64": 155, "aarch64": 41}


def unshare() -> None:
    """Move this process into new namespaces; the new process ids apply to its children, but not to the process itself."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        try:
            libc.call("unshare", _ALL)
            return
        except PermissionError:  # root in a container, without the capability
            pass
    libc.call("unshare", _NEWUSER | _ALL)
    for file, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
        with open(f"/proc/self/{file}", "w") as stream:
            stream.write(text)


def change_root(readable: Iterable[str], temporary_bytes: int) -> None:
    """Change to a root folder in memory that holds only some files of the old one, read-only, and a temporary folder.

    The temporary folder of `temporary_bytes` is empty, except for kept files with paths inside it, which are read-only as well.
    `readable` paths are kept with their contents; missing paths are ignored.
    """
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    kept = [path for path in readable if os.path.exists(path)]
    # Opened first, because the mount below may hide them.
    sources = [None if os.path.islink(path) else os.open(path, os.O_PATH | os.O_CLOEXEC) for path in kept]
    links = [os.readlink(path) if os.path.islink(path) else "" for path in kept]
    folders = [os.path.isdir(path) for path in kept]
    null = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)
    root = "/proc/self/fd/{}"
    base = "/tmp"
    _mount("tmpfs", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=1k,mode=755")
    os.umask(0o022)  # the program may run as another user, who must be able to pass through the new folders
    # Made first: kept files, such as an interpreter or an environment with its packages, may lie in the old temporary folder.
    os.mkdir(base + TEMPORARY, mode=0o755)
    options = f"size={temporary_bytes},nr_inodes=1k,mode=1777"
    _mount("tmpfs", base + TEMPORARY, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)
    for path, source, link, folder in zip(kept, sources, links, folders, strict=True):
        target = base + path
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        if source is None:
            os.symlink(link, target)
            continue
        if folder:
            os.makedirs(target, mode=0o755, exist_ok=True)
        else:
            open(target, "x").close()
        _mount(root.format(source), target, None, _MS_BIND | _MS_REC)
        _restrict(target)
        os.close(source)
    os.makedirs(f"{base}/dev", mode=0o755, exist_ok=True)
    open(base + os.devnull, "x").close()
    with suppress(OSError):  # some containers forbid it, and programs can do without it
        _mount(root.format(null), base + os.devnull, None, _MS_BIND)
    os.close(null)
    os.chdir(base)
    libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b".")
    libc.call("umount2", b".", _MNT_DETACH)
    os.chdir("/")
    _mount(None, "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.chdir(TEMPORARY)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    coded = [text if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    libc.call("mount", coded[0], coded[1], coded[2], flags, coded[3])


def _restrict(path: str) -> None:
    """Make a mount and the mounts in it read-only, without set-user-id programs and devices."""
    attributes = struct.pack("QQQQ", 1 | 2 | 4, 0, 0, 0)
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    libc.syscall(_MOUNT_SETATTR, opened, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, attributes, len(attributes))
    os.close(opened)
