"""Helpers shared with the tests of training, and enough sums for four small rollouts."""

import sys
from pathlib import Path

import pytest
from tiny_runs import write_sums

sys.path.append(str(Path(__file__).parents[1] / "training"))


@pytest.fixture(scope="session")
def sums(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("episodes") / "sums.jsonl", 16)
