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


def prime_rl_token(new, old, advantage):
    """The loss of a token, and whether it is masked: by the rise of its probability where A > 0, else by the fall."""
    moved = (new.exp() - old.exp()).item()
    masked = moved > HIGH if advantage > 0 else moved < -LOW
    return -(0.0 if masked else 1.0) * advantage * (new - old).exp() + WEIGHT * (new - old) ** 2, masked


@pytest.mark.parametrize("by_token", [False, True])
def test_dppo_equals_prime_rl(by_token):
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(16, 12, generator=generator, dtype=torch.float64)
    new = (old + 0.7 * torch.randn(16, 12, generator=generator, dtype=torch.float64)).clamp(max=-0.01).requires_grad_()
    advantages = torch.randn((16, 12) if by_token else (16,), generator=generator, dtype=torch.float64)
    mask = torch.rand(16, 12, generator=generator) > 0.3
    output = DPPOLoss(LOW, HIGH, log_ratio_coef=WEIGHT)(LossInputs(new, advantages, mask, old))
    of_tokens = advantages if by_token else advantages[:, None].expand(16, 12)
    tokens = [(new[i, t], old[i, t], of_tokens[i, t].item()) for i in range(16) for t in range(12) if mask[i, t]]
    theirs, masks = zip(*(prime_rl_token(*token) for token in tokens), strict=True)
    whole = sum(theirs) / len(tokens)  # `rl_scale`, which counts the tokens of the step
    assert output.loss.item() == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(value, new)[0] for value in (output.loss, whole)), rtol=1e-12, atol=1e-14)
    for name, up in (("low", False), ("high", True)):
        share = sum(masked and (token[2] > 0) == up for masked, token in zip(masks, tokens, strict=True)) / len(tokens)
        assert output.metrics[f"clip_ratio/{name}_mean"].item() == pytest.approx(share) and share > 0


def test_reinforce_plus_plus_equals_ms_swift_and_where_lengths_are_equal_verl():
    rewards = torch.rand(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    centred = [reward - statistics.mean(group) for group in rewards.tolist() for reward in group]
    ours = ReinforcePlusPlusAdvantage(eps=1e-12)(rewards.flatten(), 4)
    assert ours.tolist() == pytest.approx([value / statistics.stdev(centred) for value in centred], rel=1e-9)
    # verl whitens over tokens; with 5 tokens in every completion the variance has 119 in place of 23 degrees of freedom.
    tokens = [value for value in centred for _ in range(5)]
    verl = [(value - statistics.mean(tokens)) / (statistics.variance(tokens) + 1e-8) ** 0.5 for value in tokens]
    assert [value * (23 / 24 * 120 / 119) ** -0.5 for value in ours.tolist()] == pytest.approx(verl[::5], rel=1e-6)
