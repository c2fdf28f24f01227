import copy

import pytest
import torch
from rounding import additions_of, assert_same_sums
from tiny_models import build_model
from transformers.models.llama import modeling_llama

from hybrid_lightning.engine.backend import Backend
from hybrid_lightning.engine.fused_layers import rotary, use_fused_rotary

pytestmark = pytest.mark.usefixtures("with_and_without_kernels")


@pytest.mark.parametrize(("family", "fused"), [("llama", True), ("qwen2", True), ("qwen3", True), ("gpt2", False)])
def test_layers_that_rotate_as_llama_does_call_ours_and_compute_the_same(family, fused, monkeypatch):
    plain = build_model(family).eval()
    model, backend = copy.deepcopy(plain), Backend()
    use_fused_rotary(model, backend)
    layer = next(module for name, module in model.named_modules() if name.endswith(("self_attn", "attn")))
    original = next(module for name, module in plain.named_modules() if name.endswith(("self_attn", "attn")))
    assert isinstance(layer, type(original)) and (type(layer) is not type(original)) is fused
    ids = torch.randint(3, 30, (2, 7))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits), "a plain call gives transformers' own numbers"
        with backend.in_pass():
            assert_same_sums(model(ids).logits, plain(ids).logits, additions_of(model, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("angles", [1, 2])  # of one row for all, or of each
def test_values_and_gradients_are_those_of_transformers(angles, dtype):
    torch.manual_seed(0)
    q, k = (torch.randn(2, 5, heads, 8).to(dtype).transpose(1, 2) for heads in (4, 2))
    cos, sin = torch.randn(2, angles, 5, 8).to(dtype)
    outer = [torch.randn(part.shape).to(dtype) for part in (q, k)]
    theirs, backend = modeling_llama.apply_rotary_pos_emb, Backend()
    found = []
    with backend.in_pass():
        for function in (theirs, lambda *parts: rotary(theirs, backend, *parts)):
            leaves = [part.clone().requires_grad_() for part in (q, k)]
            rotated = function(*leaves, cos, sin)
            found.append([*rotated, *torch.autograd.grad(rotated, leaves, outer)])
    step = 2**-7 if dtype == torch.bfloat16 else 1e-6  # theirs rounds products and the sum
    for mine, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(mine, expected, atol=4 * step, rtol=step)


def test_what_has_no_kernel_is_computed_by_theirs():
    calls = []

    def theirs(*parts):
        calls.append(parts)
        return parts[:2]

    q, angles = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 4)
    backend = Backend()
    with backend.in_pass():
        rotary(theirs, backend, q.double(), q.double(), angles.double(), angles.double())
        rotary(theirs, backend, q.transpose(1, 2), q.transpose(1, 2), angles, angles, 2)
        rotary(theirs, backend, q, q, angles[..., :2], angles[..., :2])
    rotary(theirs, backend, q, q, angles, angles)
    assert len(calls) == 4
