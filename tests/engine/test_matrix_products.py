import pytest
import torch
from rounding import assert_same_sums

from hybrid_lightning.engine import backend as products
from hybrid_lightning.engine.backend import Backend, product

SHAPES = [
    (3, 5, 7),
    (64, 96, 128),
    (200, 64, 300),
    (0, 8, 9),
]  # the second and third are above the size from which oneDNN multiplies


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def onednn(request, monkeypatch):
    if request.param and not products._has_onednn():
        pytest.skip("this torch or processor does not multiply by oneDNN")
    monkeypatch.setattr(products, "_has_onednn", lambda: request.param)


def make(count, inner, outer, dtype=torch.float64):
    generator = torch.Generator().manual_seed(count)
    return (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((count, inner), (outer, inner)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_as_exact_as_float32_allows(shape, transposed, onednn):
    rows, weight = make(*shape)
    expected = rows @ weight.T
    if transposed:
        rows, weight = rows.T.contiguous().T, weight.T.contiguous().T
    result = product(rows.float(), weight.float())
    assert_same_sums(result, expected.float(), shape[1])
    assert result.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_constant_weight_gives_the_same_for_any_rows_and_is_not_changed(shape, dtype, onednn):
    rows, weight = make(*shape, dtype=dtype)
    kept = weight.clone()
    multiply = Backend().prepacked_product(weight)
    additions = 1 if dtype == torch.bfloat16 else shape[1]  # sums of bfloat16 are of float32, and rounded once
    for part in (rows, rows[:1], rows[::2]):
        assert_same_sums(multiply(part), part @ weight.T, additions)
    assert torch.equal(weight, kept)
