import re

import numpy as np
import pytest
import torch

from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.rewards import ExactMatch, FormatReward, RewardFunction, WeightedSum, evaluate_reward
from hybrid_lightning.types import Prompt

PROMPTS = [Prompt(text=f"{n}+1=", answer=str(n + 1), index=10 + n, source="sums.csv") for n in range(3)]
TEXTS = ["1", "5", "3"]


class Returns(RewardFunction):
    """Whatever it is given, for any batch."""

    def __init__(self, values):
        self.values = values

    def __call__(self, completions, prompts):
        return self.values


class RaisesOn(RewardFunction):
    def __init__(self, bad: str, smallest_batch: int = 1):
        self.bad = bad
        self.smallest_batch = smallest_batch

    def __call__(self, completions, prompts):
        if self.bad in completions and len(completions) >= self.smallest_batch:
            raise ZeroDivisionError("division\nby zero")
        return [0.0] * len(completions)


@pytest.mark.parametrize(
    "values",
    [
        [1.0, 0.0, 0.5],
        (True, False, 0.5),
        np.array([1.0, 0.0, 0.5]),
        [np.float32(1), np.int64(0), torch.tensor(0.5)],
        torch.tensor([1.0, 0.0, 0.5], requires_grad=True),
        torch.tensor([1.0, 0.0, 0.5], dtype=torch.bfloat16),
    ],
)
def test_every_kind_of_numbers(values):
    rewards = evaluate_reward(Returns(values), TEXTS, PROMPTS)
    assert rewards.total.tolist() == [1.0, 0.0, 0.5]
    assert rewards.total.dtype == torch.float32 and not rewards.total.requires_grad
    assert rewards.correct.tolist() == [True, False, False]
    assert list(rewards.parts) == ["returns"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "returned None for 3 completions; it must return one number per completion"),
        (1.0, "returned 1.0 for 3"),
        ("abc", "returned 'abc' for 3"),
        ([1.0, 2.0], "returned 2 values for 3"),
        (torch.ones(3, 1), r"returned shape \(3, 1\) for 3"),
        (np.ones(4), r"returned shape \(4,\) for 3"),
        ([1.0, float("nan"), 0.0], "returned nan for sums.csv row 11 with completion '5'"),
        (torch.tensor([0.0, -torch.inf, 0.0]), "returned -inf for sums.csv row 11"),
        ([1e39, 0.0, 0.0], r"returned 1e\+39 for sums.csv row 10"),
        ([0.0, 10**400, 0.0], "returned 10000.* for sums.csv row 11"),
        ([1.0, "0.5", 0.0], "returned '0.5', which is no number, for sums.csv row 11 with completion '5'"),
        ([[1.0], [0.0], [0.0]], r"returned \[1.0\], which is no number, for sums.csv row 10"),
    ],
)
def test_wrong_values_name_the_reward_and_the_row(values, message):
    with pytest.raises(RewardError, match=r"reward Returns \(returns\) " + message) as caught:
        evaluate_reward(Returns(values), TEXTS, PROMPTS)
    assert "\n" not in str(caught.value)


def test_an_exception_names_reward_row_and_completion():
    long = "5" * 500
    with pytest.raises(RewardError) as caught:
        evaluate_reward(RaisesOn(long), ["1", long, "3"], PROMPTS)
    message = str(caught.value)
    where = r"\(test_evaluate\.py line \d+\) for sums\.csv row 11"
    assert re.match(rf"reward RaisesOn \(raises_on\) raised ZeroDivisionError: division by zero {where}", message)
    assert "5 ... 5" in message and len(message) < 300 and "\n" not in message
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_of_the_batch_alone_says_so():
    with pytest.raises(
        RewardError, match=r"for a batch of 3 completions, the first .* row 10 .*for each of them alone it did not"
    ):
        evaluate_reward(RaisesOn("5", smallest_batch=2), TEXTS, PROMPTS)


def test_an_interrupt_is_no_reward_error():
    class Interrupted(RewardFunction):
        def __call__(self, completions, prompts):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_reward(Interrupted(), TEXTS, PROMPTS)


def test_no_completions():
    rewards = evaluate_reward(ExactMatch(), [], [])
    assert rewards.total.shape == rewards.correct.shape == (0,)


def test_weighted_sum_has_a_part_for_each_term():
    reward = WeightedSum([ExactMatch(), FormatReward("[15]", name="odd")], weights=[2.0, -0.5])
    rewards = evaluate_reward(reward, TEXTS, PROMPTS)
    assert rewards.parts["exact_match"].tolist() == [1.0, 0.0, 1.0]
    assert rewards.parts["odd"].tolist() == [1.0, 1.0, 0.0]
    assert rewards.total.tolist() == [1.5, -0.5, 2.0]
    assert rewards.correct.tolist() == [True, False, True]
    assert torch.equal(reward(TEXTS, PROMPTS), rewards.total)


def test_format_alone_decides_if_nothing_measures_correctness():
    rewards = evaluate_reward(WeightedSum([FormatReward("[15]")], weights=[0.5]), TEXTS, PROMPTS)
    assert not rewards.correct.any()
    assert evaluate_reward(FormatReward("[15]"), TEXTS, PROMPTS).correct.tolist() == [True, True, False]


def test_all_correctness_parts_must_be_earned():
    reward = WeightedSum([ExactMatch(), ExactMatch(pattern="([13])", name="digit")])
    assert evaluate_reward(reward, ["1", "2", "3."], PROMPTS).correct.tolist() == [True, False, False]


def test_sums_in_sums_are_resolved():
    inner = WeightedSum([FormatReward("a", name="a"), FormatReward("b", name="b")], weights=[1.0, 3.0])
    reward = WeightedSum([ExactMatch(), inner], weights=[1.0, 0.5])
    assert [(term.name, weight) for term, weight in reward.terms()] == [("exact_match", 1.0), ("a", 0.5), ("b", 1.5)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WeightedSum([]), "at least one reward"),
        (lambda: WeightedSum([ExactMatch()], [1.0, 2.0]), r"weights=\[1.0, 2.0\] for 1 rewards"),
        (lambda: WeightedSum([ExactMatch()], [float("nan")]), "finite"),
        (lambda: WeightedSum([FormatReward("a"), FormatReward("b")]), "more than one is called format_reward"),
        (lambda: WeightedSum([ExactMatch(), WeightedSum([ExactMatch()])]), "more than one is called exact_match"),
        (lambda: FormatReward("(a"), r"pattern='\(a' is no regular expression"),
        (lambda: ExactMatch("a"), "0 groups instead of 1"),
        (lambda: ExactMatch("(a)(b)"), "2 groups instead of 1"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_names():
    class HTMLTable2Reward(RewardFunction):
        def __call__(self, completions, prompts):
            return [0.0] * len(completions)

    class Named(HTMLTable2Reward):
        name = "mine"

    assert HTMLTable2Reward().name == "html_table2_reward"
    assert Named().name == "mine"
    assert ExactMatch(name="answer").name == "answer"


def test_config_describes_nested_rewards():
    config = WeightedSum([ExactMatch(ignore_case=True)], [0.5]).to_config()
    assert config["class_path"] == "hybrid_lightning.rewards.WeightedSum"
    assert config["init_args"]["rewards"][0]["init_args"] == {"ignore_case": True}
