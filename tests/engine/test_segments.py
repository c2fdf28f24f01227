"""Attention by segments, which accelerators use: on a CPU, in plain products, it gives what all other ways give."""

import pytest
import torch
from test_logprobs import build_sequences
from tiny_decoders import OfAccelerator
from tiny_decoders import build as build_adapted
from tiny_models import FAMILIES, build_model

from hybrid_lightning.engine import Backend, Engine, attention, token_logprobs
from hybrid_lightning.engine import segments as of_segments
from hybrid_lightning.engine.attention import AttentionSettings
from hybrid_lightning.engine.segment_attention import SegmentLayout, gathered_keys, segment_attention


def whole(query, key, value, runs, window, scale):
    """Attention of each query to the keys of its run, one after another; `runs` gives the keys of each query in order."""
    rows = []
    for place, keys in enumerate(runs):
        seen = keys if window is None else keys[-window:]
        repeats = query.shape[1] // key.shape[1]
        scores = torch.einsum("hd,mhd->hm", query[place], key[seen].repeat_interleave(repeats, 1)) * scale
        rows.append(torch.einsum("hm,mhd->hd", scores.softmax(-1), value[seen].repeat_interleave(repeats, 1)))
    return torch.stack(rows)


PROMPTS, COMPLETIONS = torch.tensor([3, 1, 5]), torch.tensor([[4, 1, 0], [2, 0, 0], [1, 6, 3]])


def runs_of(prompts, completions):
    """For each packed token, the packed tokens that it sees, in their order."""
    runs, begins = [], (prompts.cumsum(0) - prompts).tolist()
    for begin, count in zip(begins, prompts.tolist(), strict=True):
        runs += [list(range(begin, begin + step + 1)) for step in range(count)]
    for begin, count, lengths in zip(begins, prompts.tolist(), completions.tolist(), strict=True):
        for length in lengths:
            first = len(runs)
            runs += [[*range(begin, begin + count), *range(first, first + step + 1)] for step in range(length)]
    return runs


@pytest.mark.parametrize(("window", "filling"), [(None, 0), (1, 0), (4, 3), (9, 0), (30, 3)])
def test_values_and_gradients_are_those_of_one_query_after_another(window, filling):
    torch.manual_seed(0)
    layout = SegmentLayout.of(PROMPTS, COMPLETIONS, 5)
    gathered = gathered_keys(PROMPTS, COMPLETIONS, layout) if window is not None and window < 5 + 6 else None
    runs = runs_of(PROMPTS, COMPLETIONS)
    tokens = len(runs) + filling
    assert layout.prompt_tokens + layout.completion_tokens == len(runs)
    query, key, value = (torch.randn(tokens, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    found = segment_attention(query, key, value, layout, gathered, AttentionSettings(window, 0.3))
    expected = whole(query, key, value, runs, window, 0.3)
    assert torch.allclose(found[: len(runs)], expected, atol=1e-6) and not found[len(runs) :].any()
    slope = torch.randn(expected.shape)
    wanted = torch.autograd.grad((expected * slope).sum(), (query, key, value))
    given = torch.autograd.grad((found[: len(runs)] * slope).sum(), (query, key, value))
    for one, other in zip(given, wanted, strict=True):
        assert torch.allclose(one, other, atol=3e-6)


@pytest.mark.parametrize(
    ("family", "case", "adapted"),
    [
        *((family, "shared", False) for family in FAMILIES if family != "llama"),
        ("llama", "separate", True),
        ("mistral", "shared", True),
    ],
)
def test_all_families_train_alike(family, case, adapted):
    """Mistral's layers see 3 tokens here, so that prompts are hidden in part."""
    numbers = []
    for backend in (Backend(), OfAccelerator()):
        model = build_adapted(family).model if adapted else build_model(family).requires_grad_(True)
        engine = Engine(model, backend)
        logprobs, entropy = token_logprobs(engine, build_sequences(case), 0.8)
        assert engine.packs and engine.packed(build_sequences(case)).segments == (type(backend) is OfAccelerator)
        logprobs.sum().backward()
        numbers.append((logprobs, entropy, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)))
    for one, other in zip(*numbers, strict=True):
        assert float((one - other).norm()) <= 1e-5 * max(1.0, float(one.norm()))


def test_what_the_kernels_cannot_is_attended_as_before_and_gradients_add_up_in_one_order(monkeypatch):
    """Heads that are too large."""
    monkeypatch.setattr(attention, "_LARGEST_HEAD", 4)
    engine = Engine(build_model("llama"), OfAccelerator())
    engine.prepare()
    assert engine.packs and not engine.packed(build_sequences("shared")).segments
    assert not torch.are_deterministic_algorithms_enabled()
    with of_segments._in_one_order():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
