import subprocess
from pathlib import Path

import pytest
from fork_server import Forked


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Benchmarks are tools of this repository, and no part of what is installed."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.long)


@pytest.fixture
def forked(monkeypatch):
    """Let the workers of a benchmark be forked, and what prepares for them: each takes seconds to start."""
    monkeypatch.setattr(subprocess, "Popen", Forked)
