"""Import the modules of benchmarks/, which are scripts beside each other and no package."""

import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import Forked

FOLDER = Path(__file__).parents[2] / "benchmarks"
if str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))

import commits  # noqa: E402
import pairs  # noqa: E402
import prepare  # noqa: E402
import report  # noqa: E402
import reward  # noqa: E402
import vs_trl  # noqa: E402
import workloads  # noqa: E402

__all__ = ["FOLDER", "commits", "fork_workers", "pairs", "prepare", "report", "reward", "vs_trl", "workloads"]


def fork_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the workers of a benchmark be forked, and what prepares for them: each takes seconds to start."""
    monkeypatch.setattr(subprocess, "Popen", Forked)
