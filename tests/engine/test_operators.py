"""Each kernel gives what its formula gives in float64, in float32 and in bfloat16, whatever the sizes, strides and threads."""

import pytest
import torch
import torch.nn.functional as F
from kernel_numbers import DTYPES, assert_near, assert_same_on_any_threads, made
from rounding import assert_same_sums
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hybrid_lightning.engine.cpu import operators as kernels
from hybrid_lightning.engine.cpu.build import library
from hybrid_lightning.rollout.sampler import draw_tokens

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler: there are no kernels to test")
SIZES = [2, 7, 50, 576]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(size, dtype):
    x, weight = made(5, 3, size, dtype=dtype, scale=3), made(size, dtype=dtype, seed=1)
    outer = made(5, 3, size, dtype=dtype, seed=2)
    exact = x.double().requires_grad_()
    normed = weight.double() * exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    (gradient,) = torch.autograd.grad(normed, exact, outer.double())
    found, inverses = kernels.rms_norm(x, weight, 1e-5)
    assert_near(found, normed.detach(), dtype, roundings=2)
    assert_near(kernels.rms_norm_backward(outer, x, weight, inverses), gradient, dtype, roundings=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gated_silu_of_halves_of_one_tensor(size, dtype):
    gate, up = made(9, 2 * size, dtype=dtype, scale=4).split(size, dim=1)
    outer = made(9, size, dtype=dtype, seed=1)
    exact = [part.double().requires_grad_() for part in (gate, up)]
    product = F.silu(exact[0]) * exact[1]
    gradients = torch.autograd.grad(product, exact, outer.double())
    assert_near(kernels.gated_silu(gate, up), product.detach(), dtype, roundings=2)
    for found, gradient in zip(kernels.gated_silu_backward(outer, gate, up), gradients, strict=True):
        assert_near(found, gradient, dtype, roundings=2)


def test_silu_of_large_numbers():
    gate = torch.tensor([-1e4, -200.0, -89.0, 0.0, 89.0, 200.0, 1e4])
    expected = F.silu(gate)
    torch.testing.assert_close(kernels.gated_silu(gate[None], torch.ones(1, 7))[0], expected, atol=1e-30, rtol=1e-6)
    of_gate, _ = kernels.gated_silu_backward(torch.ones(1, 7), gate[None], torch.ones(1, 7))
    torch.testing.assert_close(of_gate[0], torch.tensor([0.0, 0, 0, 0.5, 1, 1, 1]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 16, 64])
def test_rotary_and_its_transpose(size, dtype):
    x = made(2, 4, 3 * size, dtype=dtype).view(8, 3, size)[:, 1:]  # strided
    angles = made(8, size, dtype=dtype, seed=1), made(8, size, dtype=dtype, seed=2)
    outer = made(8, 2, size, dtype=dtype, seed=3)
    exact = x.double().transpose(0, 1)[None].requires_grad_()
    cosines, sines = (part.double()[None] for part in angles)
    rotated, _ = apply_rotary_pos_emb(exact, exact, cosines, sines)
    (gradient,) = torch.autograd.grad(rotated, exact, outer.double().transpose(0, 1)[None])
    assert_near(kernels.rotary(x, *angles), rotated[0].transpose(0, 1).detach(), dtype)
    assert_near(kernels.rotary(outer, *angles, transposed=True), gradient[0].transpose(0, 1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size", "rank"), [(1, 5, 1), (4, 16, 4), (7, 50, 6), (32, 576, 48)])
def test_with_low_rank(rows, size, rank, dtype):
    x, down = made(rows, 2 * size, dtype=dtype)[:, :size], made(rank, size, dtype=torch.float32, seed=1)
    found = kernels.with_low_rank(x, down)
    assert torch.equal(found[:, :size], x)
    assert_near(found[:, size:], x.double() @ down.double().T, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "temperature"), [(3, 0.7), (256, 1.0), (1000, 0.7)])
def test_drawn_tokens_are_those_of_torch_with_their_logprobs(size, temperature, dtype):
    logits = made(64, size, dtype=dtype, scale=2)
    uniform = torch.rand(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = kernels.draw_tokens(logits, uniform, temperature)
    exact = (logits.double() / temperature).log_softmax(dim=1)
    # Sums in another order move the edges between tokens by 1e-7 of the whole at most, and none of these numbers lies so near.
    assert torch.equal(tokens, draw_tokens(logits.float() / temperature, uniform))
    assert_same_sums(logprobs, exact.gather(1, tokens[:, None])[:, 0].float(), size)


def test_every_token_is_drawn_as_often_as_its_probability_says_and_none_of_probability_zero():
    logits = torch.tensor([0.0, -torch.inf, 1.0, -2.0, -torch.inf])
    count = 20_000
    uniform = ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]
    tokens, _ = kernels.draw_tokens(logits.expand(count, -1).contiguous(), uniform, 1.0)
    torch.testing.assert_close(tokens.bincount(minlength=5) / count, logits.softmax(0), atol=1e-4, rtol=0)
    edges = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    assert kernels.draw_tokens(logits.expand(2, -1).contiguous(), edges, 1.0)[0].tolist() == [0, 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 256, 1000])
def test_logprobs_entropies_and_slopes(size, dtype):
    logits, tokens = made(9, size, dtype=dtype, scale=3), torch.arange(9) % size
    logits[:, size // 2 + 1] = -torch.inf
    exact = (logits.double() / 0.7).log_softmax(dim=1)
    entropies = torch.distributions.Categorical(logits=logits.double() / 0.7).entropy()
    for slopes in (False, True):
        given = logits.clone()
        logprobs, found = kernels.token_logprobs(given, tokens, 0.7, slopes)
        assert_same_sums(logprobs, exact.gather(1, tokens[:, None])[:, 0].float(), size, size=5.0)
        assert_same_sums(found, entropies.float(), size, size=5.0)
        if slopes:
            assert_near(given, F.one_hot(tokens, size) - exact.exp(), dtype)
        else:
            assert torch.equal(given, logits)


@pytest.mark.parametrize("token", [-1, 7])
def test_a_token_beyond_the_vocabulary_is_refused_before_anything_is_written(token):
    logits = made(2, 7, dtype=torch.float32)
    with pytest.raises(IndexError, match=r"for logits of 7 tokens"):
        kernels.token_logprobs(logits, torch.tensor([3, token]), 1.0, True)
    assert torch.equal(logits, made(2, 7, dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype):
    x = made(3, 40, dtype=dtype)
    x[1, 3] = torch.nan
    weight = torch.ones(40, dtype=dtype)
    logprobs = kernels.token_logprobs(x.clone(), torch.zeros(3, dtype=torch.long), 1.0, False)[0]
    found = [kernels.rms_norm(x, weight, 1e-5)[0].sum(1), kernels.gated_silu(x, x).sum(1), logprobs]
    found.append(kernels.with_low_rank(x, torch.ones(2, 40)).sum(1))
    for rows in found:
        assert rows.isfinite().tolist() == [True, False, True]


def test_results_do_not_depend_on_threads():
    x, weight = made(200, 576, dtype=torch.bfloat16), made(576, dtype=torch.bfloat16, seed=1)
    logits, uniform = made(40, 5000, dtype=torch.bfloat16, scale=3), torch.rand(40, 1, dtype=torch.float64)
    result, rows, down, up, outer = low_rank(1000, 64, 48, 8)

    def compute():
        parts = [kernels.rms_norm(x, weight, 1e-5)[0], kernels.gated_silu(x, x), *kernels.draw_tokens(logits, uniform, 1.0)]
        y, of_x = result.clone(), torch.zeros(1000, 64)
        low = kernels.add_low_rank(y, rows, down, up, 0.7)
        parts += [y, low, of_x, *kernels.low_rank_gradients(outer, rows, low, down, up, 0.7, of_x)]
        return [*parts, *kernels.token_logprobs(logits.clone(), torch.arange(40), 1.0, True)]

    assert_same_on_any_threads(compute)


def test_the_default_dtype_does_not_matter():
    x, weight, tokens = made(5, 40, dtype=torch.bfloat16), made(40, dtype=torch.bfloat16, seed=1), torch.arange(5)
    uniform = torch.rand(5, 1, dtype=torch.float64)

    def parts():
        found = [*kernels.rms_norm(x, weight, 1e-5), *kernels.draw_tokens(x, uniform, 1.0)]
        return [*found, *kernels.token_logprobs(x.clone(), tokens, 1.0, False)]

    expected = parts()
    try:
        torch.set_default_dtype(torch.bfloat16)  # as Lightning's bf16-true does
        found = parts()
    finally:
        torch.set_default_dtype(torch.float32)
    for part, other in zip(found, expected, strict=True):
        assert part.dtype == other.dtype and torch.equal(part, other)


def test_kernels_are_for_real_tensors_of_one_dtype_on_the_cpu():
    x = torch.zeros(2)
    assert kernels.usable(x, x) and kernels.usable(x.bfloat16(), torch.nn.Parameter(x.bfloat16()))
    assert not kernels.usable(x, x.bfloat16())
    assert not kernels.usable(x.double()) and not kernels.usable(x.half()) and not kernels.usable(x.to("meta"))


def shifted(part, places):
    """A copy of a tensor that begins so many numbers behind an address as torch gives it."""
    room = part.new_empty(part.numel() + 16)
    return room[places : places + part.numel()].view(part.shape).copy_(part)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sums_do_not_depend_on_where_numbers_lie(size, dtype):
    """A compiler may begin a sum at the next aligned address, which differs from run to run."""
    x, outer = made(5, size, dtype=dtype, scale=3), made(5, size, dtype=dtype, seed=1)
    weight, tokens = made(size, dtype=dtype, seed=2), torch.zeros(5, dtype=torch.long)
    uniform = torch.rand(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    runs = []
    for places in range(16):
        mine = [shifted(part, shift % 16) for part, shift in ((x, places), (outer, 3 * places), (weight, 5 * places))]
        logits = shifted(x, places)
        normed, inverses = kernels.rms_norm(mine[0], mine[2], 1e-5)
        of_x = kernels.rms_norm_backward(mine[1], mine[0], mine[2], inverses)
        drawn = kernels.draw_tokens(shifted(x, places), uniform, 0.9)
        runs.append([normed, inverses, of_x, *kernels.token_logprobs(logits, tokens, 0.9, slopes=True), logits, *drawn])
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


# ---- kernels of LoRA, in float32 alone

F32 = torch.float32
# Rows, numbers of an input and of an output, rank: in full lanes and not, in one part and in several.
LOW_RANK = [(1, 5, 3, 1), (23, 16, 48, 8), (25, 50, 16, 17), (60, 64, 1, 4), (800, 48, 7, 3), (1000, 32, 64, 16)]


def low_rank(rows, n, m, rank):
    """Output, input, A, B, and the gradient of the output; input and gradient are parts of wider rows."""
    x, outer = (made(rows, size + 3, dtype=F32, seed=seed)[:, 1 : size + 1] for seed, size in enumerate((n, m)))
    result, down, up = (made(*shape, dtype=F32, seed=2 + k) for k, shape in enumerate(((rows, m), (rank, n), (m, rank))))
    return result, x, down, up, outer


@pytest.mark.parametrize("sizes", LOW_RANK, ids=str)
def test_what_low_rank_factors_add_and_their_gradients(sizes):
    result, x, down, up, outer = low_rank(*sizes)
    of_x, inner = made(len(x), x.shape[1], dtype=F32, seed=5), 0.7 * outer.double() @ up.double()
    exact_low = x.double() @ down.double().T
    exact = result.double() + 0.7 * exact_low @ up.double().T
    low = kernels.add_low_rank(result, x, down, up, 0.7)
    assert_near(low, exact_low, F32)
    assert_near(result, exact, F32, roundings=2)
    exact = (inner.T @ x.double(), 0.7 * outer.double().T @ low.double(), of_x.double() + inner @ down.double())
    of_down, of_up = kernels.low_rank_gradients(outer, x, low, down, up, 0.7, of_x)
    for found, wanted in zip((of_down, of_up, of_x), exact, strict=True):
        assert_near(found, wanted, F32, roundings=2)
    without = kernels.low_rank_gradients(outer, x, low, down, up, 0.7, None)
    assert torch.equal(without[0], of_down) and torch.equal(without[1], of_up)


def test_low_rank_factors_of_no_rows():
    result, x, down, up, outer = low_rank(0, 32, 16, 4)
    low = kernels.add_low_rank(result, x, down, up, 1.0)
    assert low.shape == (0, 4)
    for gradient, factor in zip(kernels.low_rank_gradients(outer, x, low, down, up, 1.0, x.clone()), (down, up), strict=True):
        assert torch.equal(gradient, torch.zeros_like(factor))


def test_low_rank_factors_in_any_layout():
    result, x, down, up, outer = low_rank(40, 32, 48, 8)
    expected, turned = result.clone(), (down.T.contiguous().T, up.T.contiguous().T)
    low = kernels.add_low_rank(expected, x, down, up, 0.7)
    assert torch.equal(kernels.add_low_rank(result, x, *turned, 0.7), low) and torch.equal(result, expected)
    gradients = kernels.low_rank_gradients(outer, x, low, down, up, 0.7, None)
    for one, other in zip(kernels.low_rank_gradients(outer, x, low, *turned, 0.7, None), gradients, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_what_is_not_finite_in_one_row_stays_so_by_low_rank_factors():
    result, x, down, up, outer = low_rank(40, 32, 48, 8)
    x[7, 3] = torch.nan
    low = kernels.add_low_rank(result, x, down, up, 1.0)
    assert torch.equal(result.isnan().any(dim=1).nonzero().flatten(), torch.tensor([7]))
    of_down, of_up = kernels.low_rank_gradients(outer, x, low, down, up, 1.0, None)
    assert torch.equal(of_down.isnan().any(dim=0).nonzero().flatten(), torch.tensor([3])) and of_up.isnan().all()
