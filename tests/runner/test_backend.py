"""The kernels that compute the passes of a model."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from rounding import assert_same_sums

from hybrid_lightning.runner import backend as of_backend
from hybrid_lightning.runner.backend import Backend, product, why_no_halves


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
    assert Backend().why_no_segments(torch.device("cpu"), torch.bfloat16) == "cpu has no kernels for it"
    key = torch.zeros(2, dtype=torch.bfloat16)
    assert Backend().key_dtype(key) == torch.float32 and Backend().key_dtype(key.to("meta")) == torch.bfloat16


@pytest.mark.parametrize(
    ("onednn", "capability", "instructions", "fast"),
    [
        (True, "AVX512", True, True),
        (True, "AVX512", False, False),  # as Ice Lake
        (False, "AVX2", False, False),
        (False, "AVX512", True, False),  # with ONEDNN_MAX_CPU_ISA=AVX2
        (True, "DEFAULT", False, True),  # as Graviton 3
    ],
)
def test_what_the_processor_can_do_decides_in_which_dtype_products_are_fast(monkeypatch, onednn, capability, instructions, fast):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions, raising=False)
    assert (why_no_halves.__wrapped__() == "") is fast


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is of x86")
def test_the_bound_that_users_set_for_onednn_counts():
    code = "from hybrid_lightning.runner import why_no_halves; print(why_no_halves())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "this processor has no instructions for bfloat16"


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
