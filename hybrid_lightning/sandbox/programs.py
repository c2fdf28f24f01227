"""Run untrusted programs against their tests, several at a time, and find the packages that programs may import."""

import importlib.util
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.sandbox.isolation import require_isolation
from hybrid_lightning.sandbox.launch import Box, Limits, Ran, launch


@dataclass(frozen=True)
class Settings:
    """How to run programs."""

    mechanisms: tuple[str, ...]  # mechanisms of isolation (see `isolation.Isolation`)
    limits: Limits = field(default_factory=Limits)  # limits of each program
    packages: tuple[str, ...] = ()  # files and folders that programs may import (see `find_packages`)
    count_all: bool = False  # whether to run all tests; if False, stop at the first failure


@dataclass(frozen=True)
class CallTests:
    """Tests that call functions of the program."""

    tests: tuple[str, ...]  # pieces of Python code, each a test
    setup: str = ""  # code before the program: imports, classes such as ListNode
    test_setup: str = ""  # code before the tests, after `setup`
    names: tuple[str, ...] = ()  # names of the program that the tests use
    entry_point: str | None = None  # expression that is passed to `check` of each test; None if the tests have no `check`

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
        if not ran.verdict:  # also if the tests themselves exceed the limits
            return Outcome(0, len(self.tests), f"the tests: {ran.endings.get('tests') or 'no verdict'}")
        verdict = json.loads(ran.verdict)
        reason = _printable(str(verdict["reason"]))
        ending = ran.endings.get("candidate", "")
        reason = f"{ending}: {reason}" if reason and ending else reason
        return Outcome(int(verdict["passed"]), int(verdict["total"]), reason, bool(verdict.get("unusable")))


@dataclass(frozen=True)
class StandardStreamTests:
    """Tests that compare the program's output; white space at the ends of lines is ignored."""

    pairs: tuple[tuple[str, str], ...]  # (standard input, standard output)
    setup: str = ""  # code before the program

    def run(self, source: str, settings: "Settings") -> "Outcome":
        """Run a program on each input (see `run_programs`). Outputs are compared in this process, which never runs programs."""
        passed, reason = 0, ""
        for given, expected in self.pairs:
            box = Box("script", {"setup": self.setup, "source": source}, stdin=given.encode("utf-8", "surrogatepass"))
            ran = launch([box], settings.mechanisms, settings.limits, settings.packages)
            failure = _failure(ran, settings.limits, expected)
            passed += not failure
            reason = reason or failure
            # A program that runs out of time would probably do so for its other inputs as well, and delay all other programs.
            if failure and (not settings.count_all or not ran.in_time or ran.endings["script"]):
                break
        return Outcome(passed, len(self.pairs), reason)


@dataclass(frozen=True)
class Outcome:
    """The result of a program."""

    passed: int  # number of tests that passed
    total: int  # number of tests
    reason: str  # why not all tests passed, empty if they did
    unusable: bool = False  # True if these tests cannot be run against any program

    @property
    def share(self) -> float:
        """Share of the tests that passed."""
        return self.passed / self.total


def run_programs(
    programs: Sequence[tuple[str, CallTests | StandardStreamTests]], settings: Settings, workers: int
) -> list[Outcome]:
    """Run programs against their tests, `workers` at the same time.

    This takes at most `wall_seconds` for each program and for each pair of standard streams, divided by `workers`.

    Raises:
        SandboxError: If programs cannot be run, for which the programs are not to blame.
    """
    pool = ThreadPoolExecutor(max(1, min(workers, len(programs))), thread_name_prefix="sandbox")
    try:
        futures = [pool.submit(tests.run, source, settings) for source, tests in programs]
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # after an error or Ctrl-C no more programs are started


def _failure(ran: Ran, limits: Limits, expected: str) -> str:
    """Why a run does not count as passed; empty if it does."""
    if not ran.in_time:
        return f"not done after {limits.wall_seconds:g} s"
    if ran.endings["script"]:
        return f"{ran.endings['script']}: {_printable(ran.last_error[:300]) or 'no error output'}"
    same = _lines(ran.stdout.decode(errors="replace")) == _lines(expected)
    return "" if same else "wrong output"


def _printable(text: str) -> str:
    """A program's output with escapes for characters that could control a terminal or begin a new line in a log."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def make_settings(
    limits: Limits, packages: Sequence[str] = (), allow_without_isolation: bool = False, count_all: bool = False
) -> Settings:
    """Settings for this machine; for `allow_without_isolation` see `require_isolation`.

    Packages, named as in an import, are imported in the sandbox now: a failure later would make every program that needs them
    earn 0. Also name the dependencies of a package.

    Raises:
        ConfigError: If a package is not installed, or cannot be imported.
        SandboxError: See `require_isolation`.
    """
    settings = Settings(require_isolation(allow_without_isolation).mechanisms, limits, find_packages(packages), count_all)
    for name in packages:
        ran = launch([Box("script", {"setup": "", "source": f"import {name}"})], settings.mechanisms, limits, settings.packages)
        if not ran.in_time or ran.endings.get("script"):
            reason = ran.last_error or ran.endings.get("script") or f"not done after {limits.wall_seconds:g} s"
            raise ConfigError(
                f"packages: {name!r} cannot be imported in the sandbox ({reason}); "
                "name its dependencies too, install it where any user may read it, or give programs more memory and time"
            )
    return settings


def find_packages(names: Sequence[str]) -> tuple[str, ...]:
    """The files and folders of installed packages; the packages are not imported.

    Raises:
        ConfigError: If a package is not installed.
    """
    paths: list[str] = []
    for name in names:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        folders = list(spec.submodule_search_locations or []) if spec else []
        found = folders or ([spec.origin] if spec and spec.origin and Path(spec.origin).is_file() else [])
        if not found:
            raise ConfigError(
                f"packages: {name!r} is not installed; pip install it where training runs, or leave it out (use the import name)"
            )
        libraries = Path(found[0]).with_name(f"{name}.libs")  # wheels put shared libraries there
        paths += [*found, *([str(libraries)] if libraries.is_dir() else [])]
    return tuple(paths)
