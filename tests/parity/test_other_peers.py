"""Values against scalar forms of functions of peers that are not installed here, written from their equations.

- prime-rl's default loss: `default_loss_fn` in src/prime_rl/trainer/rl/loss.py at 559b4477
- ms-swift's `advantage_estimator=reinforce_plus_plus` with `scale_rewards=batch`, as its documentation defines it
- `compute_reinforce_plus_plus_baseline_outcome_advantage` in verl/trainer/ppo/core_algos.py at b178a3cd
"""

import statistics

import pytest
import torch

from hybrid_lightning.advantages import ReinforcePlusPlusAdvantage
from hybrid_lightning.losses import DPPOLoss
from hybrid_lightning.types import LossInputs

LOW, HIGH, WEIGHT = 0.15, 0.2, 1e-3


def test_dppo_equals_prime_rl():
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(16, 12, generator=generator, dtype=torch.float64)
    new = (old + 0.7 * torch.randn(16, 12, generator=generator, dtype=torch.float64)).clamp(max=-0.01).requires_grad_()
    advantages = torch.randn(16, 12, generator=generator, dtype=torch.float64)
    mask = torch.rand(16, 12, generator=generator) > 0.3
    output = DPPOLoss(LOW, HIGH, log_ratio_coef=WEIGHT)(LossInputs(new, advantages, mask, old))
    theirs, kept = [], {True: [], False: []}
    for own, before, advantage in zip(new[mask], old[mask], advantages[mask].tolist(), strict=True):
        moved, up = (own.exp() - before.exp()).item(), advantage > 0
        kept[up].append(moved <= HIGH if up else moved >= -LOW)
        theirs.append(-kept[up][-1] * advantage * (own - before).exp() + WEIGHT * (own - before) ** 2)
    whole = sum(theirs) / len(theirs)  # `rl_scale`, which counts the tokens of the step
    assert output.loss.item() == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(value, new)[0] for value in (output.loss, whole)), rtol=1e-12, atol=1e-14)
    for name, up in (("low", False), ("high", True)):
        assert 0 < output.metrics[f"clip_ratio/{name}_mean"].item() == pytest.approx(kept[up].count(False) / len(theirs))


def test_reinforce_plus_plus_equals_ms_swift_and_where_lengths_are_equal_verl():
    rewards = torch.rand(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    centred = [reward - statistics.mean(group) for group in rewards.tolist() for reward in group]
    ours = ReinforcePlusPlusAdvantage(eps=1e-12)(rewards).flatten()
    assert ours.tolist() == pytest.approx([value / statistics.stdev(centred) for value in centred], rel=1e-9)
    # verl whitens over tokens: with 5 in every completion, and 119 in place of 23 degrees of freedom.
    tokens = [value for value in centred for _ in range(5)]
    verl = [(value - statistics.mean(tokens)) / (statistics.variance(tokens) + 1e-8) ** 0.5 for value in centred]
    assert (ours * (23 / 24 * 120 / 119) ** -0.5).tolist() == pytest.approx(verl, rel=1e-6)
