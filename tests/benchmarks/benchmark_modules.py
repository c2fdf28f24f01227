"""Import the modules of benchmarks/, which are scripts beside each other and no package."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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

__all__ = ["FOLDER", "commits", "pairs", "prepare", "prepare_here", "report", "reward", "vs_trl", "workloads"]


def prepare_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `prepare.py` run in this process: its own takes seconds to start, as `test_vs_trl.py` lets it."""
    start = subprocess.run

    def run(command: list[str], *arguments: Any, **options: Any) -> Any:
        if not command[1].endswith("prepare.py"):
            return start(command, *arguments, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            prepare.main()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(pairs.subprocess, "run", run)
