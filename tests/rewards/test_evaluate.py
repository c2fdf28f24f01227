import re

import numpy as np
import pytest
import torch

from hybrid_lightning.errors import RewardError
from hybrid_lightning.rewards import (
    ExactMatch,
    FormatReward,
    GroupLength,
    MathMatch,
    RewardFunction,
    WeightedSum,
    evaluate_reward,
    extract_answers,
)
from hybrid_lightning.types import Completion, Prompt

PROMPTS = [Prompt(text=f"{n}+1=", answer=str(n + 1), index=10 + n, source="sums.csv") for n in range(3)]
TEXTS = ["1", "5", "3"]


class Returns(RewardFunction):
    """Whatever it is given, for any batch."""

    def __init__(self, values):
        self.values = values

    def __call__(self, completions, prompts):
        return self.values


class RaisesOn(RewardFunction):
    def __init__(self, bad, error=ZeroDivisionError("division\nby zero")):  # noqa: B008
        self.bad, self.error, self.calls = bad, error, 0

    def __call__(self, completions, prompts):
        self.calls += 1
        if self.bad in completions:
            raise self.error
        return [0.0] * len(completions)


def test_every_kind_of_numbers():
    kinds = [(True, False, 0.5), np.array([1.0, 0.0, 0.5]), [np.float32(1), np.int64(0), torch.tensor(0.5)]]
    kinds += [torch.tensor([1.0, 0.0, 0.5], dtype=torch.bfloat16, requires_grad=True)]
    for values in kinds:
        rewards = evaluate_reward(Returns(values), TEXTS, PROMPTS)
        assert rewards.total.tolist() == [1.0, 0.0, 0.5] and list(rewards.parts) == ["returns"]
        assert rewards.total.dtype == torch.float32 and not rewards.total.requires_grad
        assert rewards.correct.tolist() == [True, False, False]


def test_no_reward_sees_what_is_left_out():
    class Seen(RewardFunction):
        def __call__(self, completions, prompts):
            return [2.0 + (text == "3") + prompt.index for text, prompt in zip(completions, prompts, strict=True)]

    rewards = evaluate_reward(WeightedSum([Seen(), RaisesOn("5")], [0.5, 1.0]), TEXTS, PROMPTS, [True, False, True])
    assert rewards.total.tolist() == [6.0, 0.0, 7.5] and rewards.correct.tolist() == [False] * 3
    assert rewards.parts["seen"].tolist() == [12.0, 0.0, 15.0] and rewards.counted.tolist() == [True, False, True]
    lengths = [Completion("", n, True) for n in (1, 9, 3)]
    same = [PROMPTS[0]] * 3
    of_group = evaluate_reward(GroupLength(Returns([1.0] * 2)), lengths, same, [True, False, True]).parts["group_length"]
    assert of_group.tolist() == [0.5, 0.0, -0.5], "others of its group do not see it"


def test_wrong_values_name_the_reward_and_the_row():
    for values, message in (
        (None, "returned None for 3 completions; it must return one number per completion"),
        ("abc", "returned 'abc' for 3"),
        ([1.0, 2.0], "returned 2 values for 3"),
        (torch.ones(3, 1), r"returned shape \(3, 1\) for 3"),
        ([1.0, float("nan"), 0.0], "returned nan for sums.csv row 11 with completion '5'"),
        ([1e39, 0.0, 0.0], r"returned 1e\+39 for sums.csv row 10"),
        ([0.0, 10**400, 0.0], "returned 10000.* for sums.csv row 11"),
        ([1.0, "0.5", 0.0], "returned '0.5', which is not a number, for sums.csv row 11 with completion '5'"),
        ([[1.0], [0.0], [0.0]], r"returned \[1.0\], which is not a number, for sums.csv row 10"),
    ):
        with pytest.raises(RewardError, match=r"reward Returns \(returns\) " + message) as caught:
            evaluate_reward(Returns(values), TEXTS, PROMPTS)
        assert "\n" not in str(caught.value)


def test_an_exception_names_reward_row_and_completion_and_nothing_is_scored_again():
    """For a batch it names the first completion: a judge may be paid for each call."""
    long, reward = "5" * 500, RaisesOn("5" * 500)
    where = r"\(test_evaluate\.py line \d+\)"
    for texts, named in (
        ([long], "for sums.csv row 10"),
        ([long, "3"], "for a batch of 2 completions, the first for sums.csv row 10"),
    ):
        with pytest.raises(RewardError) as caught:
            evaluate_reward(reward, texts, PROMPTS[: len(texts)])
        message = str(caught.value)
        assert re.match(rf"reward RaisesOn \(raises_on\) raised ZeroDivisionError: division by zero {where} {named}", message)
        assert "5 ... 5" in message and len(message) < 300 and "\n" not in message
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert reward.calls == 2
    with pytest.raises(KeyboardInterrupt):
        evaluate_reward(RaisesOn("5", KeyboardInterrupt()), TEXTS, PROMPTS)
    assert evaluate_reward(ExactMatch(), [], []).correct.shape == (0,)


def test_all_parts_for_correctness_must_be_earned_and_a_format_alone_decides_where_there_is_none():
    rewards = evaluate_reward(WeightedSum([FormatReward("[15]")], weights=[0.5]), TEXTS, PROMPTS)
    assert not rewards.correct.any()
    assert evaluate_reward(FormatReward("[15]"), TEXTS, PROMPTS).correct.tolist() == [True, True, False]
    reward = WeightedSum([ExactMatch(), ExactMatch(pattern="([13])", name="digit")])
    assert evaluate_reward(reward, ["1", "2", "3."], PROMPTS).correct.tolist() == [True, False, False]


# ---- what a majority vote counts as the same answer


def answers(reward, *completions):
    return extract_answers(reward, completions, [Prompt(text="?", answer="3/4", source="quiz", index=7)] * len(completions))


def test_the_text_counts_or_what_exact_match_compares():
    assert answers(Returns([]), " 12\n", "12", "twelve", " \n") == ["12", "12", "twelve", None]
    assert answers(ExactMatch(), " a  b", "a b", "A b", "") == ["a b", "a b", "A b", None]
    lenient = ExactMatch(r"<(.*?)>", ignore_case=True)
    assert answers(lenient, "<a> or <B>", "<b >", "b", "< >") == ["b", "b", None, None]

    reward = WeightedSum([FormatReward(r"\d+"), ExactMatch(r"(\d+)")])  # of a sum the part that measures correctness
    assert answers(reward, "it is 12") == ["12"]
    assert answers(WeightedSum([FormatReward(r"\d+")]), "it is 12") == ["it is 12"]


def test_numbers_and_formulas_agree_however_they_are_written_and_too_hard_ones_are_no_failure():
    reward = MathMatch(cpu_seconds=0.5)
    spellings = ["It is 0.75.", r"so $\frac{6}{8}$", r"\boxed{3/4}", "$x = 0.75$", "0.7500001", r"\boxed{75\%}"]
    assert len(set(answers(reward, *spellings))) == 1
    assert len(set(answers(reward, "0.75", "0.76", "-0.75", "75", "$x+1$", "$1 + x$"))) == 5
    assert answers(reward, "", "no idea", " ") == [None] * 3
    assert set(answers(reward, "90", "9e1", "90 minutes", r"\boxed{90\text{ min}}")) == {"90"}
    assert answers(MathMatch(r"A:(.*)"), "A: 5", "5") == answers(MathMatch(r"A:(.*)"), "so 4. A: 5.0", "6")
    texts = ["(B) 5", "<think>A</think>so B", "<think>A"]
    letters = [reward.extract_answer(text, Prompt(text="?", answer="B")) for text in texts]
    assert letters == ["B", "B", None]
    large, _, after = answers(reward, r"\boxed{10^{400}}", r"\boxed{9^{9^{9}}}", "5")
    assert large is not None and [after] == answers(reward, "5.0")


def test_what_extracting_raises_is_said_with_the_row():
    own = Returns([])
    own.extract_answer = lambda *_: 1 / 0
    with pytest.raises(RewardError, match=r"raised ZeroDivisionError.* for quiz row 7"):
        answers(own, "x")
