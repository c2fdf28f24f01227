"""Installed packages that programs may import beside the standard library.

Runs untrusted programs against tests, many at a time.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.sandbox.launch import Box, Limits, Ran, launch


def find_packages(names: Sequence[str]) -> tuple[str, ...]:
    """Files and folders of packages; nothing of them is imported here.

    Args:
        names: As in an import, such as "sortedcontainers" or "numpy"; what a package needs itself has to be named too.

    Raises:
        ConfigError: If one is not installed.
    """
    paths: list[str] = []
    for name in names:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        folders = list(spec.submodule_search_locations or []) if spec else []
        found = folders or ([spec.origin] if spec and spec.origin and Path(spec.origin).is_file() else [])
        if not found:
            raise ConfigError(
                f"packages: {name!r} is not installed: pip install it where training runs, or leave it out; give the name that "
                "an import uses"
            )
        libraries = Path(found[0]).with_name(f"{name}.libs")  # where wheels put shared libraries
        paths += [*found, *([str(libraries)] if libraries.is_dir() else [])]
    return tuple(paths)


def check_packages(names: Sequence[str], paths: Sequence[str], mechanisms: Sequence[str], limits: Limits) -> None:
    """Import packages as programs do: where that fails, every program that needs one would fail, and earn nothing.

    Args:
        names: As in an import.
        paths: Where they are (see `find_packages`).
        mechanisms: Of isolation, as programs have them.
        limits: As programs have them.

    Raises:
        ConfigError: If one cannot be imported.
    """
    for name in names:
        ran = launch([Box("script", {"setup": "", "source": f"import {name}"})], mechanisms, limits, paths)
        if not ran.in_time or ran.endings.get("script"):
            said = ran.stderr.decode(errors="replace").strip().splitlines()
            reason = said[-1] if said else ran.endings.get("script") or f"not done after {limits.wall_seconds:g} s"
            raise ConfigError(
                f"packages: {name!r} cannot be imported in the sandbox ({reason}): "
                "name what it needs itself too, install it where any user may read it, or give programs more memory and time"
            )


T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How programs are run."""

    mechanisms: tuple[str, ...]  # of isolation (see `isolation.Isolation`)
    limits: Limits = field(default_factory=Limits)  # of each program
    packages: tuple[str, ...] = ()  # that it may import (see `packages.find_packages`)
    count_all: bool = False  # whether all tests run, and not only those up to the first that fails


@dataclass(frozen=True)
class CallTests:
    """Tests that call functions of the program."""

    tests: tuple[str, ...]  # Python code; each is a test of its own
    setup: str = ""  # code before the program: imports, classes such as ListNode
    test_setup: str = ""  # code before the tests, after `setup`
    names: tuple[str, ...] = ()  # what the tests call of the program by name
    entry_point: str | None = None  # expression for the argument of the function `check` that each test defines; None: no such

    def run(self, source: str, settings: "Settings") -> "Outcome":
        """Run a program against the tests (see `run_programs`)."""
        tested = sorted({*self.names, *re.findall(r"\w+", self.entry_point or "")})
        tests = {
            "setup": f"{self.setup}\n{self.test_setup}",
            "tests": self.tests,
            "names": self.names,
            "entry_point": self.entry_point,
            "tested": tested,
            "all": settings.count_all,
        }
        boxes = [Box("candidate", {"setup": self.setup, "source": source, "tested": tested}), Box("tests", tests)]
        ran = launch(boxes, settings.mechanisms, settings.limits, settings.packages)
        if not ran.in_time:
            return Outcome(0, len(self.tests), f"not done after {settings.limits.wall_seconds:g} s")
        if not ran.verdict:  # also where tests of the data set use up the limits
            return Outcome(0, len(self.tests), f"the tests: {ran.endings.get('tests') or 'no verdict'}")
        verdict = json.loads(ran.verdict)
        reason = _printable(str(verdict["reason"]))
        ending = ran.endings.get("candidate", "")
        reason = f"{ending}: {reason}" if reason and ending else reason
        return Outcome(int(verdict["passed"]), int(verdict["total"]), reason, bool(verdict.get("unusable")))


@dataclass(frozen=True)
class StandardStreamTests:
    """Pairs of what a program reads and what it must print; lines are compared without space at their ends."""

    pairs: tuple[tuple[str, str], ...]  # (standard input, standard output)
    setup: str = ""  # code before the program

    def run(self, source: str, settings: "Settings") -> "Outcome":
        """Run a program on each input; the outputs are compared here, where it never was (see `run_programs`)."""
        passed, reason = 0, ""
        for given, expected in self.pairs:
            box = Box("script", {"setup": self.setup, "source": source}, stdin=given.encode("utf-8", "surrogatepass"))
            ran = launch([box], settings.mechanisms, settings.limits, settings.packages)
            failure = _failure(ran, settings.limits, expected)
            passed += not failure
            reason = reason or failure
            # One that runs out of time would do so on the other inputs too, and hold up all others.
            if failure and (not settings.count_all or not ran.in_time or ran.endings["script"]):
                break
        return Outcome(passed, len(self.pairs), reason)


@dataclass(frozen=True)
class Outcome:
    """How a program did."""

    passed: int  # tests
    total: int
    reason: str  # why not all passed, empty if they did
    unusable: bool = False  # whether the tests cannot be run against any program

    @property
    def share(self) -> float:
        """Share of the tests that passed."""
        return self.passed / self.total


def _failure(ran: Ran, limits: Limits, expected: str) -> str:
    if not ran.in_time:
        return f"not done after {limits.wall_seconds:g} s"
    if ran.endings["script"]:
        said = ran.stderr.decode(errors="replace").strip().splitlines()
        return f"{ran.endings['script']}: {_printable(said[-1][:300]) if said else 'it said nothing'}"
    same = _lines(ran.stdout.decode(errors="replace")) == _lines(expected)
    return "" if same else "another output"


def _printable(text: str) -> str:
    """A program's words without what would control a terminal, or look like another line of a log."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.rstrip().split("\n")]
    return lines


def run_programs(
    programs: Sequence[tuple[str, CallTests | StandardStreamTests]], settings: Settings, workers: int
) -> list[Outcome]:
    """Run programs against their tests, some at a time.

    All is done after at most `wall_seconds` for each program and each pair of standard streams, divided by the workers.

    Args:
        programs: Source code, and its tests.
        settings: How each is run.
        workers: Programs that run at the same time.

    Returns:
        How each did, in the same order.

    Raises:
        SandboxError: If they cannot be run, which says nothing about them.
    """
    return _in_parallel([lambda s=s, t=t: t.run(s, settings) for s, t in programs], workers)  # type: ignore[misc]


def _in_parallel(actions: Sequence[Callable[[], T]], workers: int) -> list[T]:
    pool = ThreadPoolExecutor(max(1, min(workers, len(actions))), thread_name_prefix="sandbox")
    try:
        futures = [pool.submit(action) for action in actions]
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # after an error or Ctrl-C: no more are started
