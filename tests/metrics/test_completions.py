"""Metrics of each prompt's completions; maj@k and pass@k against every subset, one by one."""

import itertools
from collections import Counter

import pytest
import torch

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.metrics import completion_draws, completion_values, maj_at_k, numbers_of_voters, pass_at_k


def test_numbers_of_voters_and_draws_and_more_samples_than_can_be_counted_are_refused():
    assert [numbers_of_voters(n) for n in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]
    assert completion_draws(2) == {
        "avg@2": 2, "pass@1": 2, "pass@2": 2, "maj@1": 2, "maj@2": 2,
        "reward": None, "completion_length": None, "truncation_rate": 2,
    }  # fmt: skip
    assert "maj@1000" in completion_draws(1000)
    with pytest.raises(ConfigError, match="eval_samples=1001; give at most 1000"):
        completion_draws(1001)


def test_each_prompt_has_its_values_under_the_announced_names():
    correct = torch.tensor([[True, False, True, False], [False] * 4])
    answers = [["5", "6", "5", None], ["1", "2", "2", "3"]]
    reward = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.5] * 4])
    length = torch.tensor([[1, 2, 3, 4], [8, 8, 8, 6]])
    finished = torch.tensor([[True, True, True, False], [False, False, True, False]])
    values = completion_values(correct, answers, reward, length, finished)
    assert list(values) == list(completion_draws(4))
    assert values["avg@4"].tolist() == values["pass@1"].tolist() == pytest.approx([0.5, 0.0])
    for k in (2, 4):
        assert values[f"pass@{k}"].tolist() == pass_at_k(4, correct.sum(1), k).tolist()
        assert values[f"maj@{k}"].tolist() == [maj_at_k(*row, [k])[0] for row in zip(answers, correct.tolist(), strict=True)]
    assert values["maj@4"].tolist() == [1.0, 0.0] and values["pass@4"].tolist() == [1.0, 0.0]
    assert values["reward"].tolist() == [0.75, 0.5] and values["completion_length"].tolist() == [2.5, 7.5]
    assert values["truncation_rate"].tolist() == [0.25, 0.75]


GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("samples", [1, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        flags = [True] * correct + [False] * (samples - correct)
        subsets = list(itertools.combinations(flags, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert float(pass_at_k(samples, torch.tensor([correct]), k)) == pytest.approx(expected, abs=1e-12)


def by_subsets(answers, correct, k):
    """How right the vote of k completions is: the mean over their most frequent answers, and over all subsets."""
    groups = {answer: [c for a, c in zip(answers, correct, strict=True) if a == answer] for answer in answers}
    scores = []
    for subset in itertools.combinations(answers, k):
        votes = Counter(answer for answer in subset if answer is not None)
        winners = [groups[answer] for answer, count in votes.items() if count == max(votes.values())]
        scores.append(sum(sum(flags) / len(flags) for flags in winners) / max(1, len(winners)))
    return sum(scores) / len(scores)


def cases():
    """Completions with few and many answers, silent ones among them; right by answer, or by chance."""
    for samples, kinds in itertools.product([1, 2, 5, 8], [1, 2, 3, 6]):
        drawn = torch.randint(-1, kinds, (samples,), generator=GENERATOR).tolist()
        answers = [None if kind < 0 else str(kind) for kind in drawn]
        yield answers, [answer == "0" for answer in answers]
        yield answers, (torch.rand(samples, generator=GENERATOR) < 0.5).tolist()


def test_maj_at_k_is_the_mean_over_all_subsets():
    for answers, correct in cases():
        ks = range(1, len(answers) + 1)
        expected = [by_subsets(answers, correct, k) for k in ks]
        assert maj_at_k(answers, correct, ks) == pytest.approx(expected, abs=1e-12), (answers, correct)


def test_equal_votes_are_shared_silence_has_none_and_many_are_counted_in_time():
    assert maj_at_k(["5", "6"], [True, False], [2]) == [0.5]
    assert maj_at_k([None, None, None, "5"], [False, False, False, True], [1, 2, 4]) == pytest.approx([0.25, 0.5, 1.0])
    assert maj_at_k([None, None], [False, True], [1, 2]) == [0.0, 0.0]
    answers = [str(number % 40) for number in range(128)]
    correct = [answer in ("3", "7") for answer in answers]
    one, _, all_of_them = maj_at_k(answers, correct, [1, 64, 128])
    assert one == pytest.approx(sum(correct) / 128)
    assert all_of_them == pytest.approx(2 / 8), "answers 0 to 7 have four votes each, the others three"
