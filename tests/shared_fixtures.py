"""Fixtures that all tests share."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import empty_picture, write_folder
from tiny_models import build_model, build_tokenizer
from tiny_runs import write_model, write_sums
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hybrid_lightning.adapters.plan_display import draw_heatmap
from hybrid_lightning.callbacks import hybrid_adapter_setup
from hybrid_lightning.memory import settings
from hybrid_lightning.model import precision
from hybrid_lightning.runner.cpu import operators as calls
from hybrid_lightning.runner.cpu.build import library

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """Let pictures of plans be empty: one that is drawn takes as long as a fifth of a small run, and most are not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hybrid_adapter_setup, "draw_heatmap", empty_picture)
        yield


@pytest.fixture(scope="session", autouse=True)
def products_of_16_bits() -> Iterator[None]:
    """Let products have the dtype that tests ask for, whatever this processor has instructions for."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (precision, settings):
            patch.setattr(module, "why_no_halves", lambda: "")
        yield


@pytest.fixture(autouse=True)
def no_seed_of_an_earlier_command() -> Iterator[None]:
    """A command that runs in this process leaves its seed in the environment, and scripts without one would follow it."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture(scope="module")
def pictures() -> Iterator[None]:
    """Let pictures of plans be drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hybrid_adapter_setup, "draw_heatmap", draw_heatmap)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the command line: config, model, data and parts of a user's own."""
    yield from write_folder(tmp_path_factory.mktemp("command"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model for small runs. None of them changes it."""
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 problems for small runs."""
    return write_sums(tmp_path_factory.mktemp("sums") / "sums.jsonl", 24)


@pytest.fixture(scope="module")
def quick_gguf() -> Iterator[None]:
    """Reads GGUF files at once and names their tensors once. A small model takes 4 seconds; the libraries alone take 15."""
    gguf = pytest.importorskip("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "memmap", lambda path, dtype=np.uint8, mode="r": np.fromfile(path, dtype))
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        yield


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    return build_model


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs what torch's compiler would get as it is, without machine code; gives the names of functions as they are traced."""
    from torch._inductor import compile_fx

    from hybrid_lightning.runner import compiling

    names: list[str] = []
    make = compiling._compile
    monkeypatch.setattr(compile_fx, "compile_fx_inner", lambda graph, inputs, **_: lambda given: graph(*given))
    monkeypatch.setattr(compiling, "_compile", lambda *given: names.append(given[0].__name__) or make(*given))
    monkeypatch.setattr(compiling, "CODES", {})
    return names


@pytest.fixture(params=["kernels", "torch"])
def with_and_without_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test twice: with the CPU kernels and by torch alone."""
    if request.param == "torch":
        monkeypatch.setattr(calls, "library", lambda: None)
    elif library() is None:
        pytest.skip("no C++ compiler: there are no kernels")
