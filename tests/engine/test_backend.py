"""What the passes of a model are computed by."""

import pytest
import torch
from rounding import assert_same_sums

from hybrid_lightning.engine import backend as of_backend
from hybrid_lightning.engine.backend import Backend, product


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((8, 0), torch.bfloat16, ""),
        ((7, 5), torch.bfloat16, "this GPU has 7.5"),
        ((8, 0), torch.float32, "16 bits, and the model computes with float32"),
    ],
)
def test_it_needs_a_gpu_that_has_flash_attention_and_says_why_not(monkeypatch, capability, dtype, reason):
    of_backend._why_not_on.cache_clear()
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    found = Backend().why_no_segments(torch.device("cuda", 0), dtype)
    of_backend._why_not_on.cache_clear()
    assert reason in found and bool(found) == bool(reason)
    assert Backend().why_no_segments(torch.device("cpu"), torch.bfloat16) == "cpu has no kernels of it"
    key = torch.zeros(2, dtype=torch.bfloat16)
    assert Backend().key_dtype(key) == torch.float32 and Backend().key_dtype(key.to("meta")) == torch.bfloat16


@pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 7), (64, 96, 128), (200, 64, 300), (0, 8, 9)])
def test_products_are_as_exact_as_their_dtype_allows_in_any_layout_and_change_no_weight(shape, dtype, onednn, monkeypatch):
    """The second and third shape are above the size from which oneDNN multiplies."""
    if onednn and not of_backend._has_onednn():
        pytest.skip("this torch or processor does not multiply by oneDNN")
    monkeypatch.setattr(of_backend, "_has_onednn", lambda: onednn)
    count, inner, outer = shape
    rows, weight = (torch.randn(size, dtype=torch.float64) for size in ((count, inner), (outer, inner)))
    if dtype == torch.float32:
        for given in ((rows.float(), weight.float()), (rows.float().T.contiguous().T, weight.float().T.contiguous().T)):
            result = product(*given)
            assert_same_sums(result, (rows @ weight.T).float(), inner)
            assert result.dtype == torch.float32
    rows, weight = rows.to(dtype), weight.to(dtype)
    kept = weight.clone()
    multiply = Backend().prepacked_product(weight)
    additions = 1 if dtype == torch.bfloat16 else inner  # sums of bfloat16 are of float32, and rounded once
    for part in (rows, rows[:1], rows[::2]):
        assert_same_sums(multiply(part), part @ weight.T, additions)
    assert torch.equal(weight, kept)
