import pytest
from tiny_runs import write_model, write_sums


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model and 24 sums, 19 of them for training."""
    folder = tmp_path_factory.mktemp("sharding")
    write_model(folder / "model")
    write_sums(folder / "sums.jsonl", 24)
    return folder
