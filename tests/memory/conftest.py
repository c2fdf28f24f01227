"""Fixtures of tests of plans."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runs import write_folder
from tiny_models import build_model

from hybrid_lightning.memory.pass_memory import Traced, Traces
from hybrid_lightning.types import Sequences


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is planned around passes: in place of a trace, which takes a second, so much for each completion."""

    def update(self: Traces, rows: Sequences, share_full: float | None) -> Traced:
        return Traced(activations=5e4 * len(rows), logits=1e4 * len(rows), backward=5e4 * len(rows))

    def decoding(self: Traces, prompts: int, samples: int, share_full: float | None) -> Traced:
        return Traced(activations=1e4 * prompts * samples, logits=1e3, cache=1e5 * prompts * samples, packed=1e3)

    monkeypatch.setattr(Traces, "update", update)
    monkeypatch.setattr(Traces, "decoding", decoding)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the command line with a model of one layer, whose weights cannot be read."""
    for folder in write_folder(tmp_path_factory.mktemp("memory")):
        build_model("llama", num_hidden_layers=1).save_pretrained(folder / "model")
        (folder / "model" / "model.safetensors").write_bytes(b"no weights")
        yield folder
