"""Which groups teach, which are trained on, how they are dealt, and where replacements come from, by small cases in full."""

import itertools
import random

import pytest
import torch
from test_loader import Source, assert_a_stop_leaves_the_position_as_if_not_begun, assert_resumes_anywhere, build

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling, choose_groups, share_groups, useful_groups
from hybrid_lightning.rollout.loader import RolloutSchedule
from hybrid_lightning.rollout.prompt_order import PromptOrder


@pytest.mark.parametrize(
    ("useful", "sampled", "extra", "ranks", "expected"),
    [
        (32, 32, 0, 1, 0),  # enough
        (16, 32, 0, 1, 32),  # half of them teach: 16 missing need 32 more
        (31, 32, 0, 1, 8),  # a quarter of P at least
        (24, 32, 0, 1, 16),  # 10.7, in quarters of 8
        (25, 64, 1, 2, 24),  # 17.9
        (25, 64, 1, 16, 32),  # that can be dealt to 16 ranks
        (0, 32, 0, 1, 32),  # no more than P
        (3, 96, 3, 1, 0),  # the bound
    ],
)
def test_an_extra_rollout_asks_for_what_is_missing_at_the_yield_so_far(useful, sampled, extra, ranks, expected):
    assert DynamicSampling(max_extra_rollouts=3).prompts_to_add(useful, sampled, 32, extra, ranks) == expected


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


def test_groups_are_judged_by_the_parts_that_measure_correctness():
    total, correct, taught, expected = zip(*CASES.values(), strict=True)
    columns = [torch.tensor(list(itertools.chain(*column))) for column in (total, correct, taught)]
    assert useful_groups(columns[0], [columns[1]], columns[2], 2).tolist() == list(expected)
    every = torch.ones(len(columns[0]), dtype=torch.bool)
    whole = useful_groups(columns[0], [], every, 2).tolist()
    assert whole == [a != b for a, b in total], "without such a part by the whole reward"
    two = useful_groups(torch.tensor([1.0, 2.0]), [torch.ones(2), torch.tensor([0.0, 1.0])], every[:2], 2)
    assert two.tolist() == [True], "one of several parts is enough"


def test_completions_that_do_not_count_judge_nothing():
    total = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, torch.nan, 0.0])
    counted = torch.tensor([False, True, True, True, True, False, True, False, True])
    seen = torch.tensor([True] * 6 + [False, True, False])
    assert useful_groups(total, [], counted, 3, counted).tolist() == [False, True, True]
    assert useful_groups(total, [total], seen, 3, counted).tolist() == [False, True, False], "nor where they alone have tokens"


def test_the_first_that_teach_are_chosen_and_the_first_of_the_others_fill_up():
    useful = torch.tensor([0, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    assert choose_groups(useful, 3).tolist() == [1, 3, 4]
    assert choose_groups(useful, 4).tolist() == [1, 3, 4, 6]
    assert choose_groups(useful, 5).tolist() == [0, 1, 3, 4, 6]
    assert choose_groups(torch.zeros(3, dtype=torch.bool), 2).tolist() == [0, 1]


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
    """Trains on its prompts and on none of up to two further draws, which random numbers decide on."""

    def __init__(self, samples, fail_at=None):
        super().__init__(samples, fail_at)
        self.draws = []  # of each rollout

    def roll_out(self, prompts, generator, draw_more=None):
        self.draws.append([[prompt.index for prompt in prompts]])
        for count in torch.randint(0, 3, (2,), generator=generator).tolist() if draw_more else []:
            if count:
                self.draws[-1].append([prompt.index for prompt in draw_more(2 * count)])
        return super().roll_out(prompts, generator)


def test_replacements_are_the_next_prompts_of_the_order():
    source = DrawsMore(2)
    loader = build(source=source, seed=5)
    for _ in range(3):
        assert len(list(loader)) == len(loader) == 6, "an epoch has as many micro-batches as ever"
    order, number, start = PromptOrder(loader.prompts, seed=5), 0, 0
    for drawn in itertools.chain(*source.draws):
        if start + len(drawn) > 12:
            number, start = number + 1, 0
        assert drawn == order.of(number)[start : start + len(drawn)]
        start += len(drawn)
    assert len(source.draws) == 9 and number > 3, "three passes would be those of the rollouts alone"
    fixed = DrawsMore(2)
    list(build(source=fixed, shuffle=False))
    assert fixed.draws == [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]]], "what is to be overfitted is not replaced"


def test_ranks_share_every_draw():
    sources = [DrawsMore(2), DrawsMore(2), DrawsMore(2)]
    list(build(source=sources[0], schedule=RolloutSchedule(4, 2)))
    for rank in range(2):
        list(build(source=sources[1 + rank], schedule=RolloutSchedule(4, 2), rank=rank, world_size=2))
    for draws in zip(*(source.draws[0] for source in sources), strict=False):
        whole, first, second = draws
        assert first == whole[::2] and second == whole[1::2]


@pytest.mark.parametrize("consumed", [1, 13])
def test_a_run_that_draws_more_resumes_bit_for_bit(tmp_path, consumed):
    whole, resumed = assert_resumes_anywhere(DrawsMore, tmp_path, consumed)
    assert resumed.draws == whole.draws[-(-consumed // 2) :] and len({len(draws) for draws in whole.draws}) > 1
    assert_a_stop_leaves_the_position_as_if_not_begun(DrawsMore)
