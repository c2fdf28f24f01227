"""Promises of the functions besides their values and the padding: for those, see `test_each_loss` and `property`."""

import pytest
import torch

from hybrid_lightning.losses import functional as F


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
