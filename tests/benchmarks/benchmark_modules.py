"""Import the modules of benchmarks/, which are scripts beside each other and no package."""

import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"
if str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))

import pairs  # noqa: E402
import prepare  # noqa: E402
import report  # noqa: E402
import reward  # noqa: E402
import vs_trl  # noqa: E402
import workloads  # noqa: E402

__all__ = ["FOLDER", "pairs", "prepare", "report", "reward", "vs_trl", "workloads"]
