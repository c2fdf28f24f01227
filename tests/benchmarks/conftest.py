import subprocess

import pytest
from fork_server import Forked


@pytest.fixture
def forked(monkeypatch):
    """Let the workers of a benchmark be forked, and what prepares for them: each takes seconds to start."""
    monkeypatch.setattr(subprocess, "Popen", Forked)
