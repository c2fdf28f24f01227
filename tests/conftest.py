"""Our own warnings are errors in tests. Fixtures are in shared_fixtures.py, helpers in modules of their own."""

import gc
import os
import sys
import warnings
from pathlib import Path

import pytest
from fork_server import become_worker, start_shared
from messages import warnings_of

import hybrid_lightning

# Tests start many processes: without bytecode that is kept, importing the libraries takes each of them twice as long.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# No doctests in here, and pytest could not tell one conftest from another when it looks for them.
collect_ignore_glob = ["*conftest.py", "shared_fixtures.py", "fake_cuda/[!t]*.py"]


PACKAGE = Path(hybrid_lightning.__file__).parent
OUR_WARNINGS = warnings_of([*PACKAGE.rglob("*.py"), *(PACKAGE / "callbacks").glob("*.py")])
UNEXPECTED: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Load fixtures, and with them all libraries, where tests run: the process that gives them to workers needs none."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        start_shared()
        return
    become_worker()
    config.pluginmanager.import_plugin("shared_fixtures")


def pytest_warning_recorded(warning_message: warnings.WarningMessage, nodeid: str) -> None:
    """Remember a warning of ours that a test does not expect; most are errors at once, by the settings of pytest."""
    text = str(warning_message.message)
    if any(pattern.fullmatch(text) for pattern in OUR_WARNINGS):
        UNEXPECTED.append(f"{nodeid}: {text}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if UNEXPECTED:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in UNEXPECTED:
        terminalreporter.write_line(f"a warning of ours, to be expected by pytest.warns or avoided: {line}", red=True)


def pytest_collection_finish() -> None:
    """Let the garbage collector not look again and again through libraries and tests, which all stay."""
    gc.collect()
    gc.freeze()
