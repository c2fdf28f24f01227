"""Where rows are split, and that whatever number of ranks saved micro-batches, another number gets the same rows, each once."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tokens_of

from hybrid_lightning.rollout.batching import (
    batch_from_state,
    batch_to_state,
    batches_of_rank,
    join_rewards,
    pad_left,
    pad_right,
    split_by_tokens,
)
from hybrid_lightning.types import PolicyBatch, Rewards, Sequences


def batch(rows, first, with_old=True):
    """Rows numbered from `first`: row i has a prompt of i % 3 + 1 tokens and a completion of i % 4 + 1."""
    numbers = range(first, first + rows)
    if not rows:
        return replace(batch(1, first).rows(torch.zeros(0, dtype=torch.long)), old_logprobs=None)
    prompts, completions = [[i] * (i % 3 + 1) for i in numbers], [[i] * (i % 4 + 1) for i in numbers]
    sequences = Sequences(*pad_left(prompts, 0, "cpu"), *pad_right(completions, 0, "cpu"))
    sampled = sequences.completion_mask & (torch.arange(sequences.completion_ids.shape[1]) % 2 == 0)
    sequences = replace(sequences, sampled_mask=sampled, weights_step=sequences.completion_ids * 3)
    values = sequences.completion_ids.float()
    advantages = torch.tensor([float(i) for i in numbers])
    old, trained = (values * 2, sequences.completion_ids % 2 == 0) if with_old else (None, None)
    return PolicyBatch(sequences, advantages, values, old, None, 40.0, 90.0, 30.0, 80.0, policy_mask=trained)


def rows_of(batches):
    """The rows of batches, without padding."""
    found = []
    for part in batches:
        sequences = part.sequences
        fields = (sequences.sampled_mask, sequences.weights_step, part.sampling_logprobs, part.old_logprobs, part.policy_mask)
        for row, mask in enumerate(sequences.completion_mask):
            of_tokens = [field[row][mask].tolist() for field in fields]
            found.append((float(part.advantages[row]), *tokens_of(sequences, row), *of_tokens))
        counts = (part.num_sequences, part.num_tokens, part.updated_sequences, part.updated_tokens)
        assert counts == (40.0, 90.0, 30.0, 80.0)
    return found


@pytest.mark.parametrize("ranks", [1, 3, 5])
def test_every_row_of_a_checkpoint_is_dealt_once_and_unchanged(ranks):
    whole = [[batch(4, 1), batch(3, 20), batch(0, 1)], [batch(5, 5), batch(0, 30), batch(0, 2)]]
    saved = [[batch_from_state(batch_to_state(part)) for part in of_rank] for of_rank in whole]
    dealt = [batches_of_rank(saved, rank, ranks) for rank in range(ranks)]
    for step, parts in enumerate(zip(*whole, strict=True)):
        of_step = [batches[step] for batches in dealt]
        assert rows_of(part for part in of_step if len(part.sequences)) == rows_of(part for part in parts if len(part.sequences))
        sizes = [len(part.sequences) for part in of_step]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("ranks", [1, 3])
def test_rows_of_an_episode_stay_on_one_rank(ranks):
    numbered = [(batch(4, 1), [0, 0, 3, 4]), (batch(5, 5), [0, 1, 1, 1, 2])]
    saved = [[replace(part, episode_of_row=torch.tensor(episodes))] for part, episodes in numbered]
    dealt = [batches_of_rank(saved, rank, ranks)[0] for rank in range(ranks)]
    assert rows_of(dealt) == rows_of(part for part, _ in numbered)
    sizes = {1: [[2, 1, 1, 1, 3, 1]], 3: [[2, 1], [1, 1], [3, 1]]}[ranks]
    assert [part.episode_of_row.unique_consecutive(return_counts=True)[1].tolist() for part in dealt] == sizes


def test_the_same_ranks_get_back_what_they_saved_and_nothing_stays_nothing():
    saved = [[batch(4, 1)], [batch(5, 5)]]
    assert all(batches_of_rank(saved, rank, 2)[0] is saved[rank][0] for rank in range(2))
    (joined,) = batches_of_rank([[batch(2, 1, with_old=False)], [batch(0, 9)]], 0, 1)
    assert joined.old_logprobs is None and joined.policy_mask is None and len(joined.sequences) == 2


def test_rewards_are_joined_and_chosen_with_those_that_count():
    total = torch.arange(4.0).view(2, 2)
    every, some = Rewards(total, {"a": -total}, total > 1), Rewards(total, {"a": -total}, total > 1, counted=total % 2 == 0)
    assert join_rewards([every, every]).counted is None and torch.equal(every.of_counted().total, total.flatten())
    joined = join_rewards([every, some])
    assert joined.counted.tolist() == [[True] * 2] * 2 + [[True, False]] * 2
    assert joined.of_counted().parts["a"].tolist() == [-0.0, -1.0, -2.0, -3.0, -0.0, -2.0]
    chosen = joined.select(torch.tensor([3, 0]))
    assert (chosen.total.tolist(), chosen.correct.tolist()) == ([[2.0, 3.0], [0.0, 1.0]], [[True, True], [False, False]])
    assert chosen.counted.tolist() == [[True, False], [True, True]]


def test_rows_are_split_where_the_next_would_not_fit_and_a_pair_is_never_cut():
    def sequences(prompts, lengths):
        """Only the first of their tokens was sampled; a pass takes them all."""
        made = Sequences(*pad_left(prompts, 0, "cpu"), *pad_right([[5] * length for length in lengths], 0, "cpu"))
        return replace(made, sampled_mask=made.completion_mask & (torch.arange(made.completion_ids.shape[1]) == 0))

    same = sequences([[1, 2, 3, 4]] * 4, [2, 2, 3, 1])  # 4 + 2, then 2, 3 and 1
    assert split_by_tokens(same, 12) == [slice(0, 4)]
    assert split_by_tokens(same, 11) == [slice(0, 3), slice(3, 4)]
    assert split_by_tokens(same, 8) == [slice(0, 2), slice(2, 4)], "a prompt counts again in the next run"
    assert split_by_tokens(same, 1) == [slice(row, row + 1) for row in range(4)], "a row is never cut"
    assert split_by_tokens(same.rows(torch.zeros(0, dtype=torch.long)), 8) == []
    pairs = sequences([[1, 2, 3, 4]] * 4 + [[5, 6, 7, 8]] * 2, [2, 3, 1, 2, 2, 4])  # the first two have one prompt
    assert split_by_tokens(pairs, 1, 2) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert split_by_tokens(pairs, 4 + 8, 2) == [slice(0, 4), slice(4, 6)]
    assert split_by_tokens(pairs, 4 + 8 + 4 + 6, 2) == [slice(0, 6)]
