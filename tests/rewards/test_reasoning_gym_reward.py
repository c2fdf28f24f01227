"""The verifiers of reasoning-gym's tasks, with what they do not foresee."""

import pickle

import pytest

from hybrid_lightning.data import PlainFormat, ReasoningGymSource
from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.rewards import ReasoningGymReward

pytest.importorskip("reasoning_gym")


def prompts(task, size=2):
    rows = ReasoningGymSource(task, size=size, validation_size=0, test_size=0).load().train
    return [pickle.loads(pickle.dumps(PlainFormat().format(row))) for row in rows]


@pytest.mark.parametrize("task", ["leg_counting", "prime_factorization", "basic_arithmetic", "word_sorting", "countdown"])
def test_own_answers_are_right_and_others_are_not(task):
    reward, asked = ReasoningGymReward(), prompts(task)
    for prompt in asked:
        reward.check_prompt(prompt)
    assert reward([f" {prompt.answer}\n" for prompt in asked], asked) == [1.0, 1.0]
    assert max(reward(["no idea", ""], asked)) < 0.1
    tagged = ReasoningGymReward(pattern="<answer>(.*?)</answer>")
    assert tagged([f"<answer>{asked[0].answer}</answer>", asked[1].answer], asked) == [1.0, 0.0]


def test_where_the_verifier_raises_nothing_is_earned_and_nowhere_more_than_all(caplog):
    (prompt,) = prompts("prime_factorization", 1)
    assert ReasoningGymReward()(["two times three"], [prompt]) == [0.0]
    assert "verifier raised ValueError" in caplog.text and "row 0" in caplog.text
    (prompt,) = prompts("spell_backward", 1)
    assert ReasoningGymReward()([prompt.answer + "7"], [prompt])[0] <= 1.0


def test_tasks_that_cannot_be_trained_on_are_refused_at_start():
    for task, message in (("game_of_life_halting", "accepts any text"), ("list_functions", "is not reproducible")):
        with pytest.raises((ConfigError, RewardError), match=message):
            ReasoningGymReward().check_prompt(prompts(task, 1)[0])
