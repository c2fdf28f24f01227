import pytest
import torch
from transformers import MinPLogitsWarper, TopPLogitsWarper

from hybrid_lightning.rollout import sampler
from hybrid_lightning.rollout.sampler import draw_tokens, filter_logits, sums_by_doubling


@pytest.mark.parametrize("size", [1, 2, 3, 8, 100, 257])
def test_sums_by_doubling_are_cumulative_sums(size):
    whole = torch.randint(9, (3, size)).double()  # whose sums are exact in any order
    assert torch.equal(sums_by_doubling(whole), whole.cumsum(dim=1))


@pytest.mark.parametrize("doubling", [False, True], ids=["as on a CPU", "as on a GPU"])
def test_draws_and_top_p_are_those_of_cumulative_sums(doubling, monkeypatch):
    logits = 3 * torch.randn(40, 600, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(40, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = TopPLogitsWarper(0.8)(torch.empty(0), logits)
    tokens = draw_tokens(logits, uniform)
    if doubling:
        monkeypatch.setattr(sampler, "running_sums", sums_by_doubling)
    assert torch.equal(filter_logits(logits, 0, 0.8), expected)
    assert torch.equal(draw_tokens(logits, uniform), tokens)


@pytest.mark.parametrize("min_p", [0.01, 0.3, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p):
    logits = 3 * torch.randn(40, 600, generator=torch.Generator().manual_seed(0))
    kept = filter_logits(logits, 0, 1.0, min_p)
    assert torch.equal(kept, MinPLogitsWarper(min_p)(torch.empty(0), logits))
    assert 0 < float(kept.isfinite().float().mean()) < 1
