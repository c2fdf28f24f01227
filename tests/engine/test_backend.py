"""What the passes of a model are computed by, and how layers find out that one runs."""

import pytest
import torch

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
