import math

import pytest
import torch
from scalar_reference import make_inputs

from hybrid_lightning.losses import functional as F

MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
BAD = [math.inf, math.nan]


def padded_logprobs(bad: float, seed: int = 0) -> torch.Tensor:
    values = -torch.rand(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(MASK, values, bad).requires_grad_()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("function", [F.log_ratio, F.token_ratio, F.sequence_ratio, F.k3_kl])
def test_padding_contaminates_neither_values_nor_gradients(function, bad):
    new, old = padded_logprobs(bad), padded_logprobs(bad, seed=1)
    value = function(new, old, MASK)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(new.grad).all() and torch.isfinite(old.grad).all()
    assert (new.grad[~MASK] == 0).all() and (new.grad[MASK] != 0).all()


@pytest.mark.parametrize("bad", BAD)
def test_aggregations_ignore_padding(bad):
    values = torch.tensor([[1.0, 3.0, bad], [5.0, bad, bad], [bad, bad, bad]], requires_grad=True)
    assert F.sequence_means(values, MASK).tolist() == [2.0, 5.0, 0.0]
    by_sequence, by_token = F.mean_of_sequence_means(values, MASK), F.mean_over_tokens(values, MASK)
    assert by_sequence.item() == pytest.approx(7 / 3) and by_token.item() == 3.0
    (by_sequence + by_token).backward()
    assert (values.grad[~MASK] == 0).all() and torch.isfinite(values.grad).all()


def test_denominators_are_those_given():
    values = torch.tensor([[1.0, 3.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert F.mean_of_sequence_means(values, MASK, 14.0).item() == 0.5
    assert F.mean_over_tokens(values, MASK, 18.0).item() == 0.5
    assert F.mean_over_sequences(torch.tensor([1.0, 2.0]), 0.5).item() == 6.0


@pytest.mark.parametrize("denominator", [None, 0.0])
def test_nothing_to_average_gives_a_differentiable_zero(denominator):
    values = torch.full((2, 3), math.nan, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss = F.mean_of_sequence_means(values, mask, denominator) + F.mean_over_tokens(values, mask, denominator)
    loss.backward()
    assert loss.item() == 0 and (values.grad == 0).all()
    assert F.mean_of_sequence_means(values[:0], mask[:0], denominator).item() == 0


def test_ratios_by_hand():
    new = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, 7.0, 7.0], [1.0, 1.0, 1.0]])
    old = torch.tensor([[-1.5, -1.0, -1.0], [-0.25, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(F.log_ratio(new, old, MASK), torch.tensor([[0.5, -1, 0], [-0.25, 0, 0], [0, 0, 0]]))
    assert torch.allclose(F.sequence_ratio(new, old, MASK), torch.tensor([-0.25, -0.25, 0.0]).exp())
    assert torch.allclose(F.token_ratio(new, old, MASK)[0], torch.tensor([0.5, -1.0, 0.0]).exp())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.0),
        (1.5, 2.0, -2.6, 0.0),  # clipped above
        (0.5, 2.0, -1.0, -2.0),  # too unlikely but good: not clipped
        (0.5, -2.0, 1.8, 0.0),  # clipped below
        (1.5, -2.0, 3.0, 2.0),  # too likely and bad: not clipped ...
        (5.0, -2.0, 8.0, 0.0),  # ... up to the dual clip
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, loss, gradient):
    r = torch.tensor([[ratio]], dtype=torch.float64, requires_grad=True)
    value = F.clipped_surrogate(r, torch.tensor([advantage]), clip_low=0.1, clip_high=0.3, dual_clip=4.0)
    value.sum().backward()
    assert value.item() == pytest.approx(loss) and r.grad.item() == gradient


def test_clip_flags_mark_the_gradients_that_the_clip_stops():
    inputs = make_inputs(spread=0.3)
    ratio = F.token_ratio(inputs.logprobs, inputs.old_logprobs, inputs.completion_mask).detach().requires_grad_()
    F.clipped_surrogate(ratio, inputs.advantages, 0.1, 0.2).sum().backward()
    low, high = F.clip_flags(ratio, inputs.advantages, 0.1, 0.2)
    assert low.any() and high.any() and not (low & high).any()
    assert torch.equal(low | high, ratio.grad == 0)


def test_k3_is_accurate_where_the_policies_hardly_differ():
    new = torch.full((1, 1), -2.0)
    kl = F.k3_kl(new, new + 2**-12, torch.ones(1, 1, dtype=torch.bool))
    assert kl.item() == pytest.approx(2**-25, rel=1e-3)  # exp(d) - d - 1 in float32 is 4 times that


def test_absurd_ratios_stay_finite():
    new, old = torch.zeros(2, 1, requires_grad=True), torch.full((2, 1), -500.0)
    mask, advantages = torch.ones(2, 1, dtype=torch.bool), torch.tensor([1.0, -1.0])
    for ratio in (F.token_ratio(new, old, mask), F.sequence_ratio(new, old, mask)):
        loss = F.clipped_surrogate(ratio, advantages, 0.2, 0.2).sum() + F.k3_kl(old, new, mask).sum()
        (gradient,) = torch.autograd.grad(loss, new, retain_graph=True)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_per_token_gives_every_token_the_value_of_its_sequence():
    assert F.per_token(torch.tensor([1.0, 2.0, 3.0]), MASK).tolist() == [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    values = torch.rand(3, 3)
    assert F.per_token(values, MASK) is values
