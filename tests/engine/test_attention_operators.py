"""Kernels of attention give what its formula gives in float64, whatever the sizes, strides, windows and threads."""

import pytest
import torch
from kernel_numbers import DTYPES, assert_near, assert_same_on_any_threads, made

from hybrid_lightning.engine.cpu import attention_operators as kernels
from hybrid_lightning.engine.cpu.build import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler: there are no kernels to test")


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


def reference_of_packed(query, key, value, kind, window, scaling):
    tokens, heads, _ = query.shape
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for prompt, *completions in GROUPS[kind]:
        for shared, (begin, end) in [(0, prompt), *((prompt[1] - prompt[0], completion) for completion in completions)]:
            for token in range(begin, end):
                positions = [*range(prompt[0], prompt[0] + shared), *range(begin, token + 1)]
                seen[token, positions[-window:] if window else positions] = True
    key, value = (part.repeat_interleave(heads // key.shape[1], dim=1) for part in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", query, key) * scaling
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def packed_tensors(kind, size, heads, repeats, dtype):
    tokens = max(end for group in GROUPS[kind] for _, end in group)
    joined = made(tokens, heads * (repeats + 2), size, dtype=dtype)  # strided from token to token
    return (*joined.split([heads * repeats, heads, heads], dim=1), made(tokens, heads * repeats, size, dtype=dtype, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "heads", "repeats", "window"), [(32, 4, 1, None), (64, 2, 3, 7), (24, 1, 16, 290), (80, 1, 7, 1)]
)
@pytest.mark.parametrize("kind", GROUPS)
def test_packed_attention_and_its_gradients(kind, size, heads, repeats, window, dtype):
    *parts, outer = packed_tensors(kind, size, heads, repeats, dtype)
    exact = [part.double().requires_grad_() for part in parts]
    result = reference_of_packed(*exact, kind, window, 0.3)
    gradients = torch.autograd.grad(result, exact, outer.double())
    arguments = (groups_of(kind), window, 0.3)
    # Sums of up to 780 numbers, and for keys of as many times 16, in one order: this formula in torch's float32 is as far off.
    roundings = 1 if dtype == torch.bfloat16 or kind == "short" else 4
    assert_near(kernels.packed_attention(*parts, *arguments), result.detach(), dtype, roundings)
    found = kernels.packed_attention_backward(outer, *parts, *arguments)
    for part, gradient in zip(found, gradients, strict=True):
        assert_near(part, gradient, dtype, roundings)


def test_packed_attention_does_not_depend_on_threads():
    *parts, outer = packed_tensors("of several tasks", 64, 2, 3, torch.float32)
    arguments = (groups_of("of several tasks"), None, 0.3)
    assert_same_on_any_threads(
        lambda: [kernels.packed_attention(*parts, *arguments), *kernels.packed_attention_backward(outer, *parts, *arguments)]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_to_what_is_not_finite_is_not_finite(dtype):
    for number in range(3):
        *parts, outer = packed_tensors("short", 32, 1, 2, dtype)
        parts[number] = parts[number].clone()
        parts[number][2, 0, 5] = torch.nan  # of the first group's prompt
        result = kernels.packed_attention(*parts, groups_of("short"), None, 0.3)
        assert not result[2].isfinite().all() and result[5:9].isfinite().all(), "the token itself; another group is as it was"
        gradients = kernels.packed_attention_backward(outer, *parts, groups_of("short"), None, 0.3)
        assert not gradients[0][2].isfinite().all()
