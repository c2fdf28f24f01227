"""What the passes of a model are computed by, and how layers find out that one runs."""

import pytest
import torch

from hybrid_lightning.engine import backend as of_backend
from hybrid_lightning.engine.backend import Backend
from hybrid_lightning.engine.cpu.build import library

needs_operators = pytest.mark.skipif(library() is None, reason="no C++ compiler: there are no operators")


@needs_operators
def test_layers_use_operators_while_a_pass_of_their_model_runs_and_at_no_other_time():
    x = torch.zeros(2)
    backend, other = Backend(), Backend()
    assert backend.usable(x) and not backend.usable_in_layers(x)
    with backend.in_pass():
        assert backend.usable_in_layers(x) and not other.usable_in_layers(x)
        first, again = backend.recomputed_alike()
        with backend.in_pass(False):
            assert not backend.usable_in_layers(x)
    with first:
        assert not backend.usable_in_layers(x)
    with again:
        assert backend.usable_in_layers(x)


def test_keys_are_kept_in_the_dtype_of_the_products():
    key = torch.zeros(2, dtype=torch.bfloat16)
    assert Backend().key_dtype(key) == torch.float32, "on a CPU"
    assert Backend().key_dtype(key.to("meta")) == torch.bfloat16


def test_an_accelerator_says_why_not():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert Backend().why_no_segments(cpu, torch.bfloat16) == "cpu has no kernels of it"
    assert "16 bits, and the model computes with float32" in Backend().why_no_segments(gpu, torch.float32)


@pytest.mark.parametrize(("capability", "reason"), [((8, 0), ""), ((7, 5), "this GPU has 7.5")])
def test_it_needs_a_gpu_that_has_flash_attention(monkeypatch, capability, reason):
    of_backend._why_not_on.cache_clear()
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    found = Backend().why_no_segments(torch.device("cuda", 0), torch.bfloat16)
    of_backend._why_not_on.cache_clear()
    assert found.endswith(reason) and bool(found) == bool(reason)
