import math
import statistics
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lightning.advantages import (
    AdvantageEstimator,
    BatchStdAdvantage,
    GroupAdvantage,
    GroupMeanAdvantage,
    LeaveOneOutAdvantage,
    PerRewardAdvantage,
    ReinforcePlusPlusAdvantage,
)
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rewards import EpisodeReturn, evaluate_reward, rewards_to_go
from hybrid_lightning.types import Completion, Episode, Prompt, Rewards

ESTIMATORS = [GroupAdvantage(), GroupMeanAdvantage(), BatchStdAdvantage(), LeaveOneOutAdvantage(), PerRewardAdvantage()]
ESTIMATORS += [ReinforcePlusPlusAdvantage()]


@st.composite
def grouped_rewards(draw):
    """Rewards [P, G] in eighths, which float64 adds exactly."""
    prompts, samples = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    eighths = draw(st.lists(st.integers(-16, 16), min_size=prompts * samples, max_size=prompts * samples))
    return torch.tensor(eighths, dtype=torch.float64).view(prompts, samples) / 8


def by_hand(estimator: AdvantageEstimator, groups: list[list[float]]) -> list[list[float]]:
    """Advantages of groups of any sizes by a scalar loop; of a group of one 0."""
    found = []
    for group in groups:
        scale = 1.0
        if isinstance(estimator, GroupAdvantage) and len(group) > 1:  # PerRewardAdvantage among them
            scale = statistics.stdev(group) + 1e-4
        elif isinstance(estimator, LeaveOneOutAdvantage) and len(group) > 1:
            scale = (len(group) - 1) / len(group)
        found.append([(reward - statistics.mean(group)) / scale for reward in group])
    spread = {BatchStdAdvantage: groups, PerRewardAdvantage: found, ReinforcePlusPlusAdvantage: found}.get(type(estimator), [])
    every = [value for group in spread for value in group]
    scale = statistics.stdev(every) + 1e-4 if len(every) > 1 else 1.0
    return [[value / scale for value in group] for group in found]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(case=grouped_rewards(), data=st.data())
@settings(max_examples=30, deadline=None)
def test_values_equal_a_scalar_loop_in_which_what_does_not_count_is_not_there(estimator, case, data):
    rewards, whole, size = case, estimator(case), case.numel()
    every = by_hand(estimator, rewards.tolist())
    assert whole.flatten().tolist() == pytest.approx([value for group in every for value in group], rel=1e-9, abs=1e-12)
    assert torch.equal(whole, estimator(rewards, torch.ones_like(rewards, dtype=torch.bool))), "to the bit"
    counted = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).view_as(rewards)
    want = torch.zeros_like(rewards)
    values = by_hand(estimator, [group[some].tolist() for group, some in zip(rewards, counted, strict=True)])
    want[counted] = torch.tensor([value for group in values for value in group], dtype=torch.float64)
    want = want.flatten().tolist()
    known = torch.where(counted, rewards, torch.nan)
    assert estimator(known, counted).flatten().tolist() == pytest.approx(want, rel=1e-9, abs=1e-12)
    # All but one look at the total alone.
    parts = {"a": known, "b": known * 0} if isinstance(estimator, PerRewardAdvantage) else {"a": known * known}
    found = estimator.of_rewards(Rewards(known, parts, rewards > 0, {"b": -0.5}, counted))
    assert found.flatten().tolist() == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_of_equal_rewards_get_exactly_zero(estimator):
    for reward, samples in ((0.1, 8), (1 / 3, 3), (1e6, 8)):
        mixed = torch.linspace(0, 1, samples)
        advantages = estimator(torch.stack([torch.full((samples,), reward), mixed]))
        assert (advantages[0] == 0).all() and (advantages[1] != 0).any()
    parts = {"a": [[1 / 3] * 3, [0.0, 1.0, 0.5]], "b": [[0.7] * 3, [0.2, 0.0, 0.4]]}
    advantages = of_parts(estimator, **parts)
    assert (advantages[0] == 0).all() and (advantages[1] != 0).any()
    assert (of_parts(estimator, **{name: part[:1] for name, part in parts.items()}) == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_dtypes_and_no_gradient(estimator):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool):
        advantages = estimator(torch.tensor([[1, 0], [0, 1]]).to(dtype))
        assert advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and advantages.shape == (2, 2)
    assert not estimator(torch.rand(2, 2, requires_grad=True)).requires_grad
    assert estimator(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("compute", "error", "message"),
    [
        (lambda: GroupAdvantage()(torch.zeros(4, 1)), ConfigError, "samples_per_prompt=1: .*set samples_per_prompt to 2 or more"),
        (lambda: GroupAdvantage(0.0), ConfigError, "GroupAdvantage: eps=0.0"),
        (lambda: BatchStdAdvantage(math.nan), ConfigError, "BatchStdAdvantage: eps=nan"),
        (lambda: PerRewardAdvantage(math.inf), ConfigError, "PerRewardAdvantage: eps=inf"),
    ],
)
def test_what_gives_no_advantages_is_said(compute, error, message):
    with pytest.raises(error, match=message):
        compute()


def of_parts(estimator, weights=None, **parts):
    columns = {name: torch.tensor(values) for name, values in parts.items()}
    total = sum((weights or {}).get(name, 1.0) * column for name, column in columns.items())
    return estimator.of_rewards(Rewards(total, columns, total > 0, weights or {}))


def credit_by_turn(estimator, episodes, samples):
    """Advantages [P * G, K] of episodes that are given by the rewards of their turns."""
    texts = [Completion("", 1, True, episode=Episode((), len(rewards), "over", tuple(rewards))) for rewards in episodes]
    prompts, turns = [Prompt(text="?")] * len(texts), max(map(len, episodes))
    rewards = evaluate_reward(EpisodeReturn(), texts, prompts).apply(lambda values: values.view(-1, samples))
    to_go = rewards_to_go(EpisodeReturn(), texts, prompts, rewards, turns)
    return estimator.of_rewards(to_go).flatten(0, 1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_credit_by_turn_equals_a_scalar_loop(estimator, data):
    """Each turn's number is a group of the episodes that have it; the batch is all turns."""
    samples, prompts = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    some = st.lists(st.integers(-8, 8).map(lambda eighths: eighths / 8), min_size=1, max_size=3)
    episodes = data.draw(st.lists(some, min_size=samples * prompts, max_size=samples * prompts))
    found, groups = credit_by_turn(estimator, episodes, samples), []
    for start, turn in product(range(0, len(episodes), samples), range(max(map(len, episodes)))):
        groups.append([(row, turn) for row in range(start, start + samples) if turn < len(episodes[row])])
    to_go = [[sum(episodes[row][turn:]) for row, turn in group] for group in groups]
    want = dict.fromkeys(product(*map(range, found.shape)), 0.0)
    for group, values in zip(groups, by_hand(estimator, to_go), strict=True):
        want |= zip(group, values, strict=True)
    assert found.flatten().tolist() == pytest.approx(list(want.values()), rel=1e-4, abs=1e-5)


def test_of_credit_by_turn_only_the_weight_of_late_turns_is_biased():
    """The expected gradient, over all groups that a policy of two choices can play: continue or stop, then left or right."""
    go, left, samples = 0.4, 0.7, 3
    stop = ([0.3], 1 - go, (-go, 0.0))  # rewards, probability, and its logarithm's gradient in the logits of both choices
    lefts, rights = ([0.5, -1.0], go * left, (1 - go, 1 - left)), ([0.5, 2.0], go * (1 - left), (1 - go, -left))
    true = [sum(chance * gradient[k] * sum(rewards[k:]) for rewards, chance, gradient in (stop, lefts, rights)) for k in (0, 1)]
    together = [math.comb(2, n) * go**n * (1 - go) ** (2 - n) for n in range(samples)]  # n of the two others continue
    weights = {
        LeaveOneOutAdvantage: (1.0, 1 - together[0]),
        GroupMeanAdvantage: (2 / 3, sum(chance * n / (n + 1) for n, chance in enumerate(together))),
    }
    for estimator, wanted in weights.items():
        expected = [0.0, 0.0]
        for group in product((stop, lefts, rights), repeat=samples):
            found = credit_by_turn(estimator(), [rewards for rewards, *_ in group], samples)
            chance = math.prod(chance for _, chance, _ in group)
            for k in range(found.shape[1]):
                terms = (float(of_row[k]) * gradient[k] for of_row, (*_, gradient) in zip(found, group, strict=True))
                expected[k] += chance * sum(terms) / samples
        assert expected == pytest.approx([weight * value for weight, value in zip(wanted, true, strict=True)], rel=1e-5)
