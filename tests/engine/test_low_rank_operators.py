"""Kernels of LoRA give what its formulas give in float64, whatever the sizes, strides and threads."""

import pytest
import torch
from kernel_numbers import assert_near, assert_same_on_any_threads, made

from hybrid_lightning.engine.cpu import operators as kernels
from hybrid_lightning.engine.cpu.build import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler: there are no kernels to test")
F32 = torch.float32
# Rows, numbers of an input and of an output, rank: in full lanes and not, in one part and in several.
SIZES = [(1, 5, 3, 1), (23, 16, 48, 8), (25, 50, 16, 17), (60, 64, 1, 4), (800, 48, 7, 3), (1000, 32, 64, 16)]


def inputs(rows, n, m, rank):
    """Output, input, A, B, and the gradient of the output; input and gradient are parts of wider rows."""
    wide = [made(rows, size + 3, dtype=F32, seed=seed)[:, 1 : size + 1] for seed, size in enumerate((n, m))]
    return made(rows, m, dtype=F32, seed=2), wide[0], made(rank, n, dtype=F32, seed=3), made(m, rank, dtype=F32, seed=4), wide[1]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_is_added(sizes):
    result, x, down, up, _ = inputs(*sizes)
    exact_low = x.double() @ down.double().T
    exact = result.double() + 0.7 * exact_low @ up.double().T
    low = kernels.add_low_rank(result, x, down, up, 0.7)
    assert_near(low, exact_low, F32)
    assert_near(result, exact, F32, roundings=2)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients(sizes):
    _, x, down, up, outer = inputs(*sizes)
    of_x = made(len(x), x.shape[1], dtype=F32, seed=5)
    low = x @ down.T
    inner = 0.7 * outer.double() @ up.double()
    exact = (inner.T @ x.double(), 0.7 * outer.double().T @ low.double(), of_x.double() + inner @ down.double())
    of_down, of_up = kernels.low_rank_gradients(outer, x, low, down, up, 0.7, of_x)
    for found, wanted in zip((of_down, of_up, of_x), exact, strict=True):
        assert_near(found, wanted, F32, roundings=2)
    without = kernels.low_rank_gradients(outer, x, low, down, up, 0.7, None)
    assert torch.equal(without[0], of_down) and torch.equal(without[1], of_up)


def test_of_no_rows():
    result, x, down, up, outer = inputs(0, 32, 16, 4)
    low = kernels.add_low_rank(result, x, down, up, 1.0)
    assert low.shape == (0, 4)
    for gradient, factor in zip(kernels.low_rank_gradients(outer, x, low, down, up, 1.0, x.clone()), (down, up), strict=True):
        assert torch.equal(gradient, torch.zeros_like(factor))


def test_factors_in_any_layout():
    result, x, down, up, outer = inputs(40, 32, 48, 8)
    expected, turned = result.clone(), (down.T.contiguous().T, up.T.contiguous().T)
    low = kernels.add_low_rank(expected, x, down, up, 0.7)
    assert torch.equal(kernels.add_low_rank(result, x, *turned, 0.7), low) and torch.equal(result, expected)
    gradients = kernels.low_rank_gradients(outer, x, low, down, up, 0.7, None)
    for one, other in zip(kernels.low_rank_gradients(outer, x, low, *turned, 0.7, None), gradients, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_what_is_not_finite_stays_so():
    result, x, down, up, outer = inputs(40, 32, 48, 8)
    x[7, 3] = torch.nan
    low = kernels.add_low_rank(result, x, down, up, 1.0)
    assert torch.equal(result.isnan().any(dim=1).nonzero().flatten(), torch.tensor([7]))
    of_down, of_up = kernels.low_rank_gradients(outer, x, low, down, up, 1.0, None)
    assert torch.equal(of_down.isnan().any(dim=0).nonzero().flatten(), torch.tensor([3])) and of_up.isnan().all()


def test_results_do_not_depend_on_threads():
    result, x, down, up, outer = inputs(1000, 64, 48, 8)

    def compute():
        y, of_x = result.clone(), torch.zeros(1000, 64)
        low = kernels.add_low_rank(y, x, down, up, 0.7)
        return [y, low, of_x, *kernels.low_rank_gradients(outer, x, low, down, up, 0.7, of_x)]

    assert_same_on_any_threads(compute)
