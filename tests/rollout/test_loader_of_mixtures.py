"""Rollouts of mixtures have the proportions of their sets, and resume."""

import pytest
import torch
from test_loader import Source, flat

from hybrid_lightning.rollout.loader import RolloutLoader, RolloutSchedule
from hybrid_lightning.types import Prompt


def mixed(**arguments):
    """Three quarters of the draws from 5 prompts of one set, a quarter from 11 of another."""
    schedule = RolloutSchedule(4, 2, minibatches_per_rollout=2)
    data = [Prompt(text=str(i), index=i, set_name="a" if i < 5 else "b", set_weight=3.0 if i < 5 else 1.0) for i in range(16)]
    generator = torch.Generator().manual_seed(0)
    return RolloutLoader(data, Source(schedule.samples_per_prompt), schedule, generator=generator, **arguments)


def test_each_rollout_of_a_mixture_has_the_proportions_on_any_number_of_ranks():
    whole = [batch.sequences.prompt_ids[::2, 0].tolist() for batch in mixed(seed=1)]
    rollouts = [sorted(first + second) for first, second in zip(whole[::2], whole[1::2], strict=True)]
    assert len(rollouts) == 4 and all(sum(index < 5 for index in rollout) == 3 for rollout in rollouts)
    ranks = [
        [index for batch in mixed(seed=1, rank=rank, world_size=2) for index in batch.sequences.prompt_ids[::2, 0].tolist()]
        for rank in (0, 1)
    ]
    assert [sorted(ranks[0][i : i + 2] + ranks[1][i : i + 2]) for i in range(0, 8, 2)] == rollouts


@pytest.mark.parametrize("stop", [1, 3, 8, 13])
def test_a_mixture_resumes_bit_for_bit(stop):
    torch.manual_seed(1)
    loader, expected = mixed(), []
    for _ in range(3):
        expected += [flat(batch) for batch in loader]
    torch.manual_seed(1)
    first, seen = mixed(), []
    while len(seen) < stop:
        for batch in first:
            seen.append(flat(batch))
            if len(seen) == stop:
                state = first.state_dict()
                break
    second = mixed()
    second.load_state_dict(state)
    rest = []
    while len(rest) < 24 - stop:
        rest += [flat(batch) for batch in second]
    # The source numbers its rollouts from its own start, so that metrics are left aside.
    assert [row[:-1] for row in (seen + rest)[:24]] == [row[:-1] for row in expected]
