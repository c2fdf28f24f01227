"""Find out whether each mechanism of isolation works on this machine, by trying it in a process of its own."""

import json
import os
from collections.abc import Callable, Sequence

from hybrid_lightning.sandbox import landlock, namespaces, privileges, seccomp


def run(readable: Sequence[str]) -> dict[str, str]:
    """Try every mechanism.

    Args:
        readable: Files and folders that programs may read.

    Returns:
        Name of the mechanism -> why it does not work, empty if it does.
    """

    def try_landlock() -> None:
        privileges.drop(None)
        landlock.restrict(readable, [])

    def try_seccomp() -> None:
        privileges.drop(None)
        seccomp.install(threads=False)

    def try_namespaces() -> None:
        namespaces.unshare()
        if os.fork() == 0:
            namespaces.change_root(readable, 2**20)
            os._exit(0)
        if os.wait()[1]:
            raise OSError("a new root folder cannot be made")

    return {
        name: _attempt(action)
        for name, action in (("namespaces", try_namespaces), ("landlock", try_landlock), ("seccomp", try_seccomp))
    }


def _attempt(action: Callable[[], None]) -> str:
    """Perform an action in a forked process. Returns why it failed, or an empty text."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        reason = ""
        try:
            action()
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
        os.write(writing, json.dumps(reason).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else "the process that tried it was killed"
