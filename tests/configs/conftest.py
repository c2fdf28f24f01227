"""A folder to run in, and a model in place of the ones that configs name."""

from pathlib import Path

import hub_contents
import pytest


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with a chat template that reads `enable_thinking`."""
    return hub_contents.write_model(tmp_path_factory.mktemp("tiny"), "qwen3")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, and empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
