"""Fixtures of tests of plans."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runs import write_folder
from tiny_models import build_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the command line with a model of one layer; its weights cannot be read."""
    for folder in write_folder(tmp_path_factory.mktemp("memory")):
        build_model("llama", num_hidden_layers=1).save_pretrained(folder / "model")
        (folder / "model" / "model.safetensors").write_bytes(b"no weights")
        yield folder
