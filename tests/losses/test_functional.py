"""What the functions promise beside the values, which `test_each_loss` compares with scalar loops."""

import math

import pytest
import torch

from hybrid_lightning.losses import functional as F

MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_padding_contaminates_neither_values_nor_gradients(bad):
    new, old = (torch.where(MASK, torch.full((3, 3), value), bad).requires_grad_() for value in (-0.5, -0.7))
    for function in (F.log_ratio, F.token_ratio, F.sequence_ratio, F.k3_kl):
        value = function(new, old, MASK)
        gradients = torch.autograd.grad(value.sum(), (new, old))
        assert torch.isfinite(value).all() and all(torch.isfinite(gradient).all() for gradient in gradients)
        assert (gradients[0][~MASK] == 0).all() and (gradients[0][MASK] != 0).all()
    values = torch.tensor([[1.0, 3.0, bad], [5.0, bad, bad], [bad, bad, bad]])
    assert F.sequence_means(values, MASK).tolist() == [2.0, 5.0, 0.0]
    assert F.mean_of_sequence_means(values, MASK, 14.0).item() == 0.5 and F.mean_over_tokens(values, MASK, 18.0).item() == 0.5


def test_k3_is_accurate_where_the_policies_hardly_differ_and_absurd_ratios_stay_finite():
    new = torch.full((1, 1), -2.0)
    kl = F.k3_kl(new, new + 2**-12, torch.ones(1, 1, dtype=torch.bool))
    assert kl.item() == pytest.approx(2**-25, rel=1e-3)  # exp(d) - d - 1 in float32 is 4 times that
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
