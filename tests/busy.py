"""A machine on which other processes want all cores."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Each ends with the process that started it, should that be killed, and in any case after two minutes.
_WORK = """
import os, time
parent, end = os.getppid(), time.monotonic() + 120
while os.getppid() == parent and time.monotonic() < end:
    sum(range(100_000))
"""


@contextmanager
def busy_machine(processes_a_core: int) -> Iterator[None]:
    """Within this context so many processes a core compute."""
    count = processes_a_core * len(os.sched_getaffinity(0))
    processes = [subprocess.Popen([sys.executable, "-I", "-S", "-c", _WORK]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
