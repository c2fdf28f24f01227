"""Which groups teach, how they are dealt, and where replacements come from, by small cases in full."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from test_loader import Source, build

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling, share_groups, useful_groups
from hybrid_lightning.rollout.prompt_order import PromptOrder
from hybrid_lightning.types import Rewards


def test_whatever_happens_ranks_can_share_what_is_asked_for_and_it_ends():
    rng = random.Random(0)
    for _ in range(300):
        ranks, share = rng.randint(1, 4), rng.randint(1, 7)
        wanted, rule = ranks * share, DynamicSampling(rng.randint(1, 4))
        useful, sampled, rounds = rng.randint(0, wanted), wanted, 0
        while count := rule.prompts_to_add(useful, sampled, wanted, rounds, ranks):
            assert 0 < count <= wanted and count % ranks == 0
            useful, sampled, rounds = useful + rng.randint(0, count), sampled + count, rounds + 1
        assert useful >= wanted or rounds == rule.max_extra_rollouts
    assert DynamicSampling().prompts_to_add(31, 32, 32, 0, 1) == 8, "a quarter at least"
    assert DynamicSampling().prompts_to_add(25, 64, 32, 1, 2) == 24, "17.9 in quarters of 8"
    assert DynamicSampling().prompts_to_add(25, 64, 32, 1, 16) == 32, "a number that 16 ranks can share"
    with pytest.raises(ConfigError, match=r"max_extra_rollouts=0 must be at least 1; to replace nothing.*dynamic_sampling=null"):
        DynamicSampling(0)


# Groups of two: total, correctness, whether the loss sees them -> whether they teach.
CASES = {
    "all right": ([1.0, 1.0], [1.0, 1.0], [True, True], False),
    "all wrong": ([0.0, 0.0], [0.0, 0.0], [True, True], False),
    "one right": ([1.0, 0.0], [1.0, 0.0], [True, True], True),
    "partly right": ([0.25, 0.5], [0.25, 0.5], [True, True], True),
    "right, and one of them long": ([1.0, 0.6], [1.0, 1.0], [True, True], False),
    "one right, which a penalty makes up for": ([0.0, 0.0], [1.0, 0.0], [True, True], False),
    "one right and cut": ([1.0, 0.0], [1.0, 0.0], [False, True], True),
    "all cut": ([1.0, 0.0], [1.0, 0.0], [False, False], False),
}


def rewards_of(total, **parts):
    total = torch.tensor(total)
    return Rewards(total, {name: torch.tensor(part) for name, part in parts.items()}, total >= 1)


def test_groups_are_judged_by_the_parts_that_measure_correctness():
    total, correct, taught, expected = zip(*CASES.values(), strict=True)
    rewards, trained = rewards_of(total, right=correct), torch.tensor(taught)
    assert useful_groups(rewards, ["right"], trained).tolist() == list(expected)
    whole = useful_groups(rewards, [], torch.ones_like(trained)).tolist()
    assert whole == [a != b for a, b in total], "without such a part by the whole reward"
    two = rewards_of([[1.0, 2.0]], same=[[1.0, 1.0]], other=[[0.0, 1.0]])
    assert useful_groups(two, ["same", "other"], torch.ones(1, 2) > 0).tolist() == [True], "one of several parts is enough"


def test_completions_that_do_not_count_judge_nothing():
    total = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, torch.nan, 0.0]]
    counted = torch.tensor([[False, True, True], [True, True, False], [True, False, True]])
    seen = torch.tensor([[True] * 3, [True] * 3, [False, True, False]])
    rewards = replace(rewards_of(total, part=total), counted=counted)
    assert useful_groups(rewards, [], counted).tolist() == [False, True, True]
    assert useful_groups(rewards, ["part"], seen).tolist() == [False, True, False], "nor where they alone have tokens"


def test_ranks_share_evenly_and_minibatches_keep_their_groups():
    rng = random.Random(1)
    for _ in range(300):
        ranks, minibatches, share = rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 4)
        owners = [rng.randrange(rng.randint(1, ranks)) for _ in range(ranks * minibatches * share)]
        shares = share_groups(owners, ranks, minibatches)
        size = len(owners) // minibatches
        for minibatch in range(minibatches):
            parts = [numbers[minibatch * share : (minibatch + 1) * share] for numbers in shares]
            assert sorted(itertools.chain(*parts)) == list(range(minibatch * size, (minibatch + 1) * size))
        if minibatches == 1:
            moved = sum(owners[number] != rank for rank, numbers in enumerate(shares) for number in numbers)
            assert moved == sum(max(0, owners.count(rank) - share) for rank in range(ranks)), "no more than has to"
    assert share_groups([0, 0, 0, 1, 1, 0], 2, 2) == [[0, 1, 2], [3, 4, 5]], "a minibatch of three is not dealt evenly"


class DrawsMore(Source):
    """Draws two more prompts for each rollout, and trains on the first ones."""

    drawn = ()

    def begin(self, prompts, generator, draw_more=None):
        self.drawn += (*prompts, *(draw_more(2) if draw_more else ()))
        return super().begin(prompts, generator)


def test_replacements_are_the_next_prompts_of_the_order():
    source, fixed = DrawsMore(2), DrawsMore(2)
    loader = build(source=source, seed=5)
    assert len(list(loader)) == len(loader) == 6, "an epoch keeps its number of micro-batches"
    order = PromptOrder(loader.prompts, seed=5)
    assert [prompt.index for prompt in source.drawn] == [*order.of(0), *order.of(1)[:6]]
    list(build(source=fixed, shuffle=False))
    assert [prompt.index for prompt in fixed.drawn] == list(range(12)), "prompts to overfit are not replaced"
