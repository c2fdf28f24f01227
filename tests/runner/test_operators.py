"""Each kernel gives what its formula gives in float64, in float32 and in bfloat16, whatever the sizes, strides and threads."""

import pytest
import torch
import torch.nn.functional as F
from kernel_numbers import DTYPES, assert_near, made
from rounding import assert_same_sums
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hybrid_lightning.rollout.sampler import draw_tokens
from hybrid_lightning.runner.cpu import operators as kernels
from hybrid_lightning.runner.cpu.build import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler: there are no kernels to test")
SIZES = [2, 7, 50, 576]
F32 = torch.float32


def exactly(function, inputs, outer):
    """What a formula gives in float64, and its gradients."""
    exact = [part.double().requires_grad_() for part in inputs]
    result = function(*exact)
    return result.detach(), torch.autograd.grad(result, exact, outer.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_norms_and_gated_silu_of_halves_of_one_tensor(size, dtype):
    x, weight, outer = (
        made(*shape, dtype=dtype, scale=3 - seed, seed=seed) for seed, shape in enumerate([(5, 3, size), (size,), (5, 3, size)])
    )

    def norm(x):
        return weight.double() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    normed, (gradient,) = exactly(norm, [x], outer)
    found, inverses = kernels.rms_norm(x, weight, 1e-5)
    assert_near(found, normed, dtype, roundings=2)
    assert_near(kernels.rms_norm_backward(outer, x, weight, inverses), gradient, dtype, roundings=2)
    gate, up = made(9, 2 * size, dtype=dtype, scale=4).split(size, dim=1)
    outer = made(9, size, dtype=dtype, seed=1)
    product, gradients = exactly(lambda gate, up: F.silu(gate) * up, [gate, up], outer)
    assert_near(kernels.gated_silu(gate, up), product, dtype, roundings=2)
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

    def rotated(x):
        x = x.transpose(0, 1)[None]
        return apply_rotary_pos_emb(x, x, *(part.double()[None] for part in angles))[0][0].transpose(0, 1)

    expected, (gradient,) = exactly(rotated, [x], outer)
    assert_near(kernels.rotary(x, *angles), expected, dtype)
    assert_near(kernels.rotary(outer, *angles, transposed=True), gradient, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size", "rank"), [(1, 5, 1), (4, 16, 4), (7, 50, 6), (32, 576, 48)])
def test_with_low_rank(rows, size, rank, dtype):
    x, down = made(rows, 2 * size, dtype=dtype)[:, :size], made(rank, size, dtype=F32, seed=1)
    found = kernels.with_low_rank(x, down)
    assert torch.equal(found[:, :size], x)
    assert_near(found[:, size:], x.double() @ down.double().T, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "temperature"), [(3, 0.7), (256, 1.0), (1000, 0.7)])
def test_drawn_tokens_are_torchs_with_their_logprobs(size, temperature, dtype):
    logits = made(64, size, dtype=dtype, scale=2)
    logits[:32, [0, -1]] = -torch.inf
    uniform = torch.rand(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    uniform[0], uniform[1] = 0, 1 - 2**-53
    tokens, logprobs = kernels.draw_tokens(logits, uniform, temperature)
    exact = (logits.double() / temperature).log_softmax(dim=1)
    # Sums in another order move the edges between tokens by 1e-7 of the whole at most, and none of these numbers lies so near.
    assert torch.equal(tokens, draw_tokens(logits.float() / temperature, uniform)) and logprobs.isfinite().all()
    assert_same_sums(logprobs, exact.gather(1, tokens[:, None])[:, 0].float(), size)


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
    for token in (-1, size):
        with pytest.raises(IndexError, match=f"for logits of {size} tokens"):
            kernels.token_logprobs(given := logits.clone(), torch.tensor([0] * 8 + [token]), 1.0, True)
        assert torch.equal(given, logits), "it is refused before anything is written"


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype):
    x = made(3, 40, dtype=dtype)
    x[1, 3] = torch.nan
    logprobs = kernels.token_logprobs(x.clone(), torch.zeros(3, dtype=torch.long), 1.0, False)[0]
    found = [kernels.rms_norm(x, torch.ones(40, dtype=dtype), 1e-5)[0].sum(1), kernels.gated_silu(x, x).sum(1), logprobs]
    for rows in (*found, kernels.with_low_rank(x, torch.ones(2, 40)).sum(1)):
        assert rows.isfinite().tolist() == [True, False, True]
    for number in range(3):
        *parts, outer = packed_tensors("short", 32, 1, 2, dtype)
        parts[number] = parts[number].clone()
        parts[number][2, 0, 5] = torch.nan  # of the first group's prompt
        result = kernels.packed_attention(*parts, groups_of("short"), None, 0.3)
        assert not result[2].isfinite().all() and result[5:9].isfinite().all(), "the token itself; another group is as it was"
        gradients = kernels.packed_attention_backward(outer, *parts, groups_of("short"), None, 0.3)
        assert not gradients[0][2].isfinite().all()
    result, x, down, up, outer = low_rank(40, 32, 48, 8)
    x[7, 3] = torch.nan
    low = kernels.add_low_rank(result, x, down, up, 1.0)
    assert result.isnan().any(dim=1).nonzero().tolist() == [[7]]
    of_down, of_up = kernels.low_rank_gradients(outer, x, low, down, up, 1.0, None)
    assert of_down.isnan().any(dim=0).nonzero().tolist() == [[3]] and of_up.isnan().all()


def test_neither_threads_nor_the_default_dtype_matter():
    x, weight = made(200, 576, dtype=torch.bfloat16), made(576, dtype=torch.bfloat16, seed=1)
    logits, uniform = made(40, 5000, dtype=torch.bfloat16, scale=3), torch.rand(40, 1, dtype=torch.float64)
    result, rows, down, up, outer = low_rank(1000, 64, 48, 8)
    *parts, slope = packed_tensors("of several tasks", 64, 2, 3, F32)
    rest, zeros = (groups_of("of several tasks"), None, 0.3), torch.zeros(1000, 64)

    def compute():
        found = [*kernels.rms_norm(x, weight, 1e-5), kernels.gated_silu(x, x), *kernels.draw_tokens(logits, uniform, 1.0)]
        y, of_x = result.clone(), zeros.clone()
        low = kernels.add_low_rank(y, rows, down, up, 0.7)
        found += [y, low, of_x, *kernels.low_rank_gradients(outer, rows, low, down, up, 0.7, of_x)]
        found += [kernels.packed_attention(*parts, *rest), *kernels.packed_attention_backward(slope, *parts, *rest)]
        return [*found, *kernels.token_logprobs(logits.clone(), torch.arange(40), 1.0, True)]

    threads, expected = torch.get_num_threads(), compute()
    try:
        for count, dtype in ((1, torch.bfloat16), (2, F32), (3, F32)):
            torch.set_num_threads(count)
            torch.set_default_dtype(dtype)
            for part, other in zip(compute(), expected, strict=True):
                assert part.dtype == other.dtype and torch.equal(part, other)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(F32)


def shifted(part, places):
    """A copy of a tensor that begins this many numbers after an address that torch allocates."""
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
        assert all(map(torch.equal, run, runs[0]))


# ---- LoRA, in float32 alone

# Rows, numbers of an input and of an output, rank: in full lanes and not, in one part and in several, and no rows.
LOW_RANK = [(1, 5, 3, 1), (23, 16, 48, 8), (25, 50, 16, 17), (60, 64, 1, 4), (800, 48, 7, 3), (1000, 32, 64, 16), (0, 32, 16, 4)]


def low_rank(rows, n, m, rank):
    """Output, input, A, B, and the gradient of the output; input and gradient are parts of wider rows."""
    x, outer = (made(rows, size + 3, dtype=F32, seed=seed)[:, 1 : size + 1] for seed, size in enumerate((n, m)))
    result, down, up = (made(*shape, dtype=F32, seed=2 + k) for k, shape in enumerate(((rows, m), (rank, n), (m, rank))))
    return result, x, down, up, outer


@pytest.mark.parametrize("sizes", LOW_RANK, ids=str)
def test_what_low_rank_factors_add_and_their_gradients(sizes):
    given, x, down, up, outer = low_rank(*sizes)
    before, inner = made(len(x), x.shape[1], dtype=F32, seed=5), 0.7 * outer.double() @ up.double()
    exact_low, runs = x.double() @ down.double().T, []
    for factors in ((down, up), (down.T.contiguous().T, up.T.contiguous().T)):  # in any layout
        result, of_x = given.clone(), before.clone()
        low = kernels.add_low_rank(result, x, *factors, 0.7)
        of_down, of_up = kernels.low_rank_gradients(outer, x, low, *factors, 0.7, of_x)
        without = kernels.low_rank_gradients(outer, x, low, *factors, 0.7, None)
        assert torch.equal(without[0], of_down) and torch.equal(without[1], of_up)
        runs.append((low, result, of_down, of_up, of_x))
    exact = (given.double() + 0.7 * exact_low @ up.double().T, inner.T @ x.double(), 0.7 * outer.double().T @ low.double())
    exact = (exact_low, *exact, before.double() + inner @ down.double())
    assert low.shape == exact_low.shape
    for found, other, wanted in zip(*runs, exact, strict=True):
        torch.testing.assert_close(found, other, atol=0, rtol=0)
        if wanted.numel():
            assert_near(found, wanted, F32, roundings=2)


# ---- attention


def reference_of_decoding(query, key, value, prompt, own, slots, counts, lengths, window, scaling):
    """`own` holds the new tokens, too."""
    result = torch.empty(query.shape, dtype=torch.float64)
    samples, repeats = own[0].shape[2], query.shape[1] // key.shape[1]
    for row, (slot, count) in enumerate(zip(slots.tolist(), counts.tolist(), strict=True)):
        place, sample = divmod(slot, samples)
        pairs = []
        for shared, mine in zip(prompt, own, strict=True):
            pairs.append(torch.cat([shared[place, :, : lengths[place]], mine[place, :, sample, :count]], dim=1).double())
        keys, values = (part[:, -window:] if window else part for part in pairs)
        keys, values = keys.repeat_interleave(repeats, dim=0), values.repeat_interleave(repeats, dim=0)
        weights = torch.einsum("hd,hsd->hs", query[row].double(), keys).mul(scaling).softmax(-1)
        result[row] = torch.einsum("hs,hsd->hd", weights, values)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "repeats", "window"), [(32, 1, None), (64, 3, 2), (96, 2, 6), (128, 5, 100), (256, 4, 6)])
def test_decode_attention(size, repeats, window, dtype):
    prompts, samples, heads, width, capacity = 3, 4, 2, 7, 9
    prompt = made(2, prompts, heads, width, size, dtype=dtype).unbind()
    own = made(2, prompts, heads, samples, capacity, size, dtype=dtype, seed=1).unbind()
    # Some slots have no row, and one has three new tokens.
    lengths, slots, counts = torch.tensor([7, 3, 5]), torch.tensor([0, 2, 2, 2, 5, 11]), torch.tensor([4, 5, 6, 7, 1, 9])
    query, key, value = made(6, heads * (repeats + 2), size, dtype=dtype, seed=2).split([heads * repeats, heads, heads], dim=1)
    arguments = (slots, counts, lengths, window, 0.3)
    before = [part.clone() for part in own]
    found = kernels.decode_attention(query, key, value, prompt, own, *arguments)
    assert_near(found, reference_of_decoding(query, key, value, prompt, own, *arguments), dtype)
    for part, old, new in zip(own, before, (key, value), strict=True):
        for row, (slot, count) in enumerate(zip(slots.tolist(), counts.tolist(), strict=True)):
            old[slot // samples, :, slot % samples, count - 1] = new[row]
        assert torch.equal(part, old), "the new token's key and value are kept in their places, and nothing else is touched"


# Begin and end of the segments of each group, its prompt's first; scattered over the row as bands do it, one of them empty.
GROUPS = {
    "short": [[(0, 5), (9, 12), (14, 30)], [(5, 9), (12, 14), (14, 14)], [(30, 32)]],
    "of several tasks": [[(0, 300), (310, 780), (300, 301), (301, 310)], [(780, 781), (781, 800)]],
}


def groups_of(kind):
    counts = torch.tensor([0, *(len(group) for group in GROUPS[kind])])
    return kernels.Groups(torch.tensor([segment for group in GROUPS[kind] for segment in group]), counts.cumsum(0))


def packed_tensors(kind, size, heads, repeats, dtype):
    tokens = max(end for group in GROUPS[kind] for _, end in group)
    joined = made(tokens, heads * (repeats + 2), size, dtype=dtype)  # strided from token to token
    return (*joined.split([heads * repeats, heads, heads], dim=1), made(tokens, heads * repeats, size, dtype=dtype, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "size", "heads", "repeats", "window"),
    [
        *(("short", 32, 4, 1, None), ("short", 64, 2, 3, 7), ("short", 80, 1, 7, 1)),
        *(("of several tasks", 64, 2, 3, None), ("of several tasks", 24, 1, 16, 290), ("of several tasks", 32, 4, 1, 7)),
    ],
)
def test_packed_attention_and_its_gradients(kind, size, heads, repeats, window, dtype):
    *parts, outer = packed_tensors(kind, size, heads, repeats, dtype)
    seen = torch.zeros(len(outer), len(outer), dtype=torch.bool)
    for prompt, *completions in GROUPS[kind]:
        for shared, (begin, end) in [(0, prompt), *((prompt[1] - prompt[0], completion) for completion in completions)]:
            for token in range(begin, end):
                positions = [*range(prompt[0], prompt[0] + shared), *range(begin, token + 1)]
                seen[token, positions[-window:] if window else positions] = True

    def attention(query, key, value):
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        scores = torch.einsum("nhd,mhd->hnm", query, key) * 0.3
        return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)

    result, gradients = exactly(attention, parts, outer)
    arguments = (groups_of(kind), window, 0.3)
    # Sums of up to 780 numbers, and for keys of as many times 16, in one order: this formula in torch's float32 is as far off.
    roundings = 1 if dtype == torch.bfloat16 or kind == "short" else 4
    assert_near(kernels.packed_attention(*parts, *arguments), result, dtype, roundings)
    for part, gradient in zip(kernels.packed_attention_backward(outer, *parts, *arguments), gradients, strict=True):
        assert_near(part, gradient, dtype, roundings)
