import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lightning.advantages import (
    AdvantageEstimator,
    BatchStdAdvantage,
    GroupAdvantage,
    GroupMeanAdvantage,
    centred,
)
from hybrid_lightning.errors import ConfigError, RewardError

ESTIMATORS = [GroupAdvantage(), GroupMeanAdvantage(), BatchStdAdvantage()]


@st.composite
def grouped_rewards(draw):
    """Rewards [B] in eighths, which float64 adds exactly, and G."""
    prompts, samples = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    eighths = draw(st.lists(st.integers(-16, 16), min_size=prompts * samples, max_size=prompts * samples))
    return torch.tensor(eighths, dtype=torch.float64) / 8, samples


def scalar_advantages(estimator: AdvantageEstimator, rewards: list[float], samples: int) -> list[float]:
    advantages = []
    for start in range(0, len(rewards), samples):
        group = rewards[start : start + samples]
        scale = {
            GroupAdvantage: lambda group=group: statistics.stdev(group) + 1e-4,
            GroupMeanAdvantage: lambda: 1.0,
            BatchStdAdvantage: lambda: statistics.stdev(rewards) + 1e-4,
        }[type(estimator)]()
        advantages += [(reward - statistics.mean(group)) / scale for reward in group]
    return advantages


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(case=grouped_rewards())
@settings(max_examples=30, deadline=None)
def test_values_equal_a_scalar_loop(estimator, case):
    rewards, samples = case
    want = scalar_advantages(estimator, rewards.tolist(), samples)
    assert estimator(rewards, samples).tolist() == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(case=grouped_rewards(), data=st.data())
@settings(max_examples=30, deadline=None)
def test_order_and_shift_do_not_matter(estimator, case, data):
    rewards, samples = case
    plain = estimator(rewards, samples)
    within = torch.tensor(data.draw(st.permutations(range(samples))))
    groups = torch.tensor(data.draw(st.permutations(range(len(rewards) // samples))))
    order = (groups[:, None] * samples + within).flatten()
    assert torch.allclose(estimator(rewards[order], samples), plain[order], rtol=1e-9, atol=1e-12)
    shift = data.draw(st.integers(-64, 64)) / 8
    assert torch.allclose(estimator(rewards + shift, samples), plain, rtol=1e-9, atol=1e-12)
    assert torch.allclose(plain.view(-1, samples).sum(dim=1), torch.zeros((), dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -7.7, 1e6])
@pytest.mark.parametrize("samples", [2, 3, 7, 8])
def test_tied_groups_get_exactly_zero(estimator, reward, samples):
    mixed = torch.linspace(0, 1, samples)
    advantages = estimator(torch.cat([torch.full((samples,), reward), mixed]), samples)
    assert (advantages[:samples] == 0).all() and (advantages[samples:] != 0).any()


def test_rounding_noise_is_what_the_exact_zero_avoids():
    tied = torch.full((1, 8), 0.1)
    assert (tied - tied.mean(dim=1, keepdim=True)).abs().max() > 0
    assert (centred(tied) == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("dtype", "want"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
        (torch.bool, torch.float32),
    ],
)
def test_dtypes(estimator, dtype, want):
    advantages = estimator(torch.tensor([1, 0, 0, 1]).to(dtype), 2)
    assert advantages.dtype == want and advantages.shape == (4,)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_gradient_and_no_rewards(estimator):
    assert not estimator(torch.rand(4, requires_grad=True), 2).requires_grad
    assert estimator(torch.zeros(0), 4).shape == (0,)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("samples", [1, 0, -2])
def test_a_group_of_one_is_refused(estimator, samples):
    with pytest.raises(ConfigError, match=rf"samples_per_prompt={samples}: .*set samples_per_prompt to 2 or more"):
        estimator(torch.zeros(4), samples)


@pytest.mark.parametrize("shape", [(5,), (2, 2), ()])
def test_rewards_must_come_in_groups(shape):
    with pytest.raises(ConfigError, match="which is not"):
        GroupAdvantage()(torch.zeros(shape), 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_named(bad):
    with pytest.raises(RewardError, match=rf"reward of completion 2 is {bad} \(1 of 4"):
        GroupAdvantage()(torch.tensor([0.0, 1.0, bad, 0.0]), 2)


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("cls", [GroupAdvantage, BatchStdAdvantage])
def test_bad_eps(cls, eps):
    with pytest.raises(ConfigError, match=rf"{cls.__name__}: eps={eps}"):
        cls(eps)
