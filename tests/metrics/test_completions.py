"""What completions say of each prompt."""

import pytest
import torch

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.metrics import completion_draws, completion_values, maj_at_k, numbers_of_voters, pass_at_k


def test_numbers_of_voters_are_powers_of_two_and_all():
    assert [numbers_of_voters(n) for n in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


def test_values_are_those_of_each_prompt_under_the_names_announced():
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


def test_shares_have_intervals_and_more_samples_than_can_be_counted_are_refused():
    assert completion_draws(2) == {
        "avg@2": 2, "pass@1": 2, "pass@2": 2, "maj@1": 2, "maj@2": 2,
        "reward": None, "completion_length": None, "truncation_rate": 2,
    }  # fmt: skip
    assert "maj@1000" in completion_draws(1000)
    with pytest.raises(ConfigError, match="eval_samples must be at most 1000, got 1001"):
        completion_draws(1001)
