"""Attention by segments, which accelerators use: on a CPU, in plain products, it gives what all other ways give."""

import pytest
import torch
from rounding import assert_same_sums
from test_logprobs import build_sequences
from test_packing import build_sequences as build_many
from tiny_decoders import OfAccelerator
from tiny_decoders import build as build_adapted
from tiny_models import FAMILIES, build_model

from hybrid_lightning.runner import Backend, ModelRunner, PackedSequences, attention, token_logprobs
from hybrid_lightning.runner.attention import AttentionSettings
from hybrid_lightning.runner.segments import Attended, Segments, attend, joined


@pytest.mark.parametrize("window", [None, 1, 4, 9, 50])
def test_values_and_gradients_equal_the_other_way(window):
    """At the tokens that predict others. Numbers follow from ids and positions: the two ways order other tokens differently."""
    torch.manual_seed(0)
    tables, found = [torch.randn(30, 50, heads, 8, requires_grad=True) for heads in (4, 2, 2)], []
    for backend in (Backend(), OfAccelerator()):
        packed = PackedSequences(build_many(), backend, segments=type(backend) is OfAccelerator)
        rows = [table[packed.ids, packed.positions] for table in tables]
        result = packed.predicting(packed.attend(0, *rows, AttentionSettings(window, 0.3)).flatten(1))
        slope = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
        found.append([result.detach(), *torch.autograd.grad((result * slope).sum(), tables)])
    assert_same_sums(*found, additions=2 * (8 + 45), size=1.0)


def test_a_run_without_keys_has_no_weight_whatever_sign_its_infinity_has():
    """FlashAttention's is plus infinity."""
    query, key, begins = torch.randn(3, 4, 8), torch.randn(5, 2, 8), torch.tensor([0, 1, 3], dtype=torch.int32)
    seen, unseen = (Segments(begins, torch.tensor(keys, dtype=torch.int32), 2, 4, False) for keys in ([0, 1, 5], [0, 0, 0]))
    some, none = (attend(query, key, key, segments, AttentionSettings()) for segments in (seen, unseen))
    assert (none.sums == torch.inf).all() and some.sums.isfinite().all()
    for sums in (none.sums, -none.sums):
        for found in (joined(some, Attended(none.result, sums)), joined(Attended(none.result, sums), some)):
            assert torch.equal(found.result, some.result) and torch.equal(found.sums, some.sums)


@pytest.mark.parametrize(
    ("family", "case", "adapted", "largest_head"),
    [
        *((family, "shared", False, 256) for family in FAMILIES),
        *(("llama", "separate", True, 256), ("mistral", "shared", True, 256)),
        ("llama", "shared", False, 4),  # rows that the kernels cannot compute are attended as without segments
    ],
)
def test_all_families_train_alike(family, case, adapted, largest_head, monkeypatch):
    """Mistral's layers see 3 tokens here, so that prompts are hidden in part."""
    monkeypatch.setattr(attention, "_LARGEST_HEAD", largest_head)
    numbers = []
    for backend in (Backend(), OfAccelerator()):
        model = build_adapted(family).model if adapted else build_model(family).requires_grad_(True)
        runner, segments = ModelRunner(model, backend), type(backend) is OfAccelerator and largest_head > 4
        logprobs, entropy = token_logprobs(runner, build_sequences(case), 0.8)
        assert runner.packs and runner.packed(build_sequences(case)).segments == segments
        logprobs.sum().backward()
        numbers.append((logprobs, entropy, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)))
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
    for one, other in zip(*numbers, strict=True):
        assert float((one - other).norm()) <= 1e-5 * max(1.0, float(one.norm()))
