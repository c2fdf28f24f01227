"""Fixtures that all tests share; helpers have modules of their own, since several folders have a conftest."""

import gc
from collections.abc import Callable

import pytest
import torch
from tiny_models import build_model, build_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

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
