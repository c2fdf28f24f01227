"""Enough sums for four small rollouts."""

import pytest
from tiny_runs import write_sums


@pytest.fixture(scope="session")
def sums(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("training") / "sums.jsonl", 16)
