"""Facts about processes on Linux: their memory, and which belong together. Only the standard library is imported here."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

_MARK = "HYBRID_LIGHTNING_BENCHMARK"  # in the environment of all processes that belong together


def resident_bytes(process: int | str = "self") -> tuple[int, int]:
    """Resident bytes of a process, now and at most since its start or `forget_peak`; 0 if it has ended.

    The peak from `getrusage` would include the parent's memory from before this program started.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in lines)
    now, peak = (int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def forget_peak() -> None:
    """Count the peak of this process from now on."""
    if (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")


class Family:
    """A process and all processes that it starts in any way: they inherit a mark in `environment`."""

    def __init__(self) -> None:
        self.mark = uuid4().hex
        self.environment = {_MARK: self.mark}

    def members(self) -> dict[int, tuple[list[str], dict[str, str]]]:
        """All live processes: id -> command and environment."""
        found: dict[int, tuple[list[str], dict[str, str]]] = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                texts = [(path / name).read_bytes().decode(errors="replace") for name in ("environ", "cmdline")]
            except OSError:  # has ended meanwhile, or is another user's
                continue
            entries, command = (text.split("\0") for text in texts)
            environment = dict(entry.partition("=")[::2] for entry in entries)
            if environment.get(_MARK) == self.mark and command != [""]:  # a zombie's is empty
                found[int(path.name)] = (command, environment)
        return found

    def kill(self) -> None:
        for process in self.members():
            with suppress(ProcessLookupError):  # has just ended by itself
                os.kill(process, signal.SIGKILL)
