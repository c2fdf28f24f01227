"""A model and problems for small runs, which a file may replace by its own."""

from pathlib import Path

import pytest
from tiny_runs import write_model, write_sums


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sums(tmp_path_factory.mktemp("sums") / "sums.jsonl", 24)
