from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout.prompt_order import PromptOrder, prompts_digest, take_turns
from hybrid_lightning.types import Prompt


def prompts(**sets):
    """Name -> (rows, weight)."""
    return [
        Prompt(text=f"{name}{index}", index=index, set_name=name, set_weight=weight)
        for name, (rows, weight) in sets.items()
        for index in range(rows)
    ]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=7), st.integers(1, 200))
def test_every_beginning_has_the_proportions(weights, count):
    weights = {str(number): weight for number, weight in enumerate(weights)}
    turns = take_turns(weights, count)
    assert len(turns) == count
    drawn = Counter()
    for number, name in enumerate(turns, start=1):
        drawn[name] += 1
        for other, weight in weights.items():
            assert abs(drawn[other] - number * weight / sum(weights.values())) < 1


def test_a_set_that_would_never_be_drawn_is_refused():
    with pytest.raises(ConfigError, match=r"the weight 0\.001 of set 'a' gives it no draw in an epoch of 55 prompts"):
        PromptOrder(prompts(a=(5, 0.001), b=(50, 1)), seed=0)


def test_all_rows_of_a_set_are_drawn_equally_often_over_epochs():
    data = prompts(small=(7, 1), large=(43, 4))
    order = PromptOrder(data, seed=0)
    drawn = [data[position] for epoch in range(8) for position in order.of(epoch)]
    for name, rows, draws in (("small", 7, 10), ("large", 43, 40)):
        indices = [prompt.index for prompt in drawn if prompt.set_name == name]
        assert len(indices) == 8 * draws
        for start in range(0, 8 * draws - rows, rows):  # one permutation after the other, across epochs
            assert sorted(indices[start : start + rows]) == list(range(rows))
        assert indices[:rows] != indices[rows : 2 * rows]


def test_it_depends_on_seed_and_epoch_alone_and_is_a_permutation_without_weights():
    data = prompts(a=(10, 1), b=(30, 3))
    one, other = PromptOrder(data, seed=1), PromptOrder(data, seed=1)
    fourth = one.of(4)
    assert [other.of(epoch) for epoch in range(5)][4] == fourth == one.of(4)
    assert one.of(0) != PromptOrder(data, seed=2).of(0) and one.of(0) != one.of(1)
    expected = torch.randperm(40, generator=torch.Generator().manual_seed(5 * 1_000_003 + 2)).tolist()
    assert PromptOrder(prompts(a=(10, None), b=(30, None)), seed=5).of(2) == expected


def test_prompts_are_compared_by_their_content():
    one, other, odd = (Prompt(text="1+1=", columns={"x": x}) for x in (1, 2, object()))
    digests = {prompts_digest(some) for some in ([one], [other], [odd], [one, other], [other, one], [])}
    assert len(digests) == 6
    assert prompts_digest([odd]) == prompts_digest([replace(odd, columns={"x": object()}, source="elsewhere.jsonl")])
