"""Fixtures that all tests share; helpers have modules of their own, since several folders have a conftest."""

import gc
from collections.abc import Callable

import pytest
import torch
from tiny_models import build_model, build_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hybrid_lightning.engine.cpu import operators as calls
from hybrid_lightning.engine.cpu.build import library

torch.set_num_threads(1)

# No doctests in here, and pytest could not tell one conftest from another when it looks for them.
collect_ignore_glob = ["*conftest.py"]


def pytest_collection_finish() -> None:
    """Let the garbage collector not look again and again through libraries and tests, which all stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    return build_model


@pytest.fixture(params=["kernels", "torch"])
def with_and_without_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test twice: with the CPU kernels and by torch alone."""
    if request.param == "torch":
        monkeypatch.setattr(calls, "library", lambda: None)
    elif library() is None:
        pytest.skip("no C++ compiler: there are no kernels")
