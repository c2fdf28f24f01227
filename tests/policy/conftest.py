"""A model and sums that the runs of these tests share; no run changes them."""

import pytest
from tiny_runs import write_model, write_sums


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="session")
def sums(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("policy") / "sums.jsonl", 16)
