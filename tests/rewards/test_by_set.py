import pytest
import torch

from hybrid_lightning.errors import ConfigError, DataError, RewardError
from hybrid_lightning.rewards import (
    ExactMatch,
    FormatReward,
    MultipleChoice,
    RewardBySet,
    RewardFunction,
    WeightedSum,
    evaluate_reward,
    extract_answers,
)
from hybrid_lightning.types import Prompt

TEXT, LETTER = Prompt(text="?", answer="12", set_name="sums"), Prompt(text="?", answer="C", set_name="quiz", index=1, source="q")


class Short(RewardFunction):
    def __call__(self, completions, prompts):
        return torch.ones(1)


def test_each_set_has_its_own():
    reward = RewardBySet({"sums": ExactMatch(), "quiz": MultipleChoice()})
    texts, prompts = ["12", "(C)", "(C)", "12"], [TEXT, LETTER, TEXT, LETTER]
    result = evaluate_reward(WeightedSum([reward, FormatReward(r"\(")], [1.0, 0.5]), texts, prompts)
    assert result.total.tolist() == [1.0, 1.5, 0.5, 0.0] and result.correct.tolist() == [True, True, False, False]
    assert result.parts["reward_by_set"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert extract_answers(reward, texts, prompts) == ["12", "C", "(C)", None]


def test_a_set_without_a_reward_is_named():
    with pytest.raises(DataError, match="q row 1 is of set 'quiz', which has no reward; there is one for sums"):
        RewardBySet({"sums": ExactMatch()}).check_prompt(LETTER)


def test_a_reward_of_the_wrong_size_is_no_reward_for_all():
    with pytest.raises(RewardError, match="the reward of set 'sums' returned 1 values for 2 completions"):
        evaluate_reward(RewardBySet({"sums": Short()}), ["1", "2"], [TEXT, TEXT])


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({}, "give each set a reward"),
        ({"a": WeightedSum([ExactMatch()])}, "the reward of set 'a' is a sum"),
        ({"a": ExactMatch(), "b": FormatReward("x")}, "all rewards must measure correctness, or none"),
    ],
)
def test_bad_arguments(rewards, message):
    with pytest.raises(ConfigError, match=message):
        RewardBySet(rewards)
