"""One model, and one vLLM server that serves it, for all tests of a session."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_of_tests import TAKES_LORA, Server, write_model

sys.path.append(str(Path(__file__).parents[1] / "sharding"))  # for the helper that starts ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one worker have all tests with the server of the session, and the test that takes longest begin first, beside them."""
    items.sort(key=lambda item: "test_a_server_that_hangs" not in item.name)
    for item in items:
        with_server = "server" in item.fixturenames or "[server" in item.name or item.path.name == "test_engines.py"
        item.add_marker(pytest.mark.xdist_group("server" if with_server else item.path.stem))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # With tied embeddings, which an engine has to share again after it got them.
    return write_model(tmp_path_factory.mktemp("model"), tied=True)


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(model, tmp_path_factory.mktemp("server") / "log.txt", *TAKES_LORA)
    yield running
    running.stop()
