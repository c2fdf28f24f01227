import pytest
import torch

from hybrid_lightning.advantages import GroupAdvantage, PerRewardAdvantage
from hybrid_lightning.errors import ConfigError, DataError, RewardError
from hybrid_lightning.rewards import (
    ExactMatch,
    FormatReward,
    FunctionReward,
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


def test_a_set_without_a_reward_or_with_one_of_the_wrong_size_is_named():
    with pytest.raises(DataError, match="q row 1 belongs to set 'quiz', which has no reward; the sets with a reward are sums"):
        RewardBySet({"sums": ExactMatch()}).check_prompt(LETTER)
    with pytest.raises(RewardError, match="the reward of set 'sums' returned 1 values for 2 completions"):
        evaluate_reward(RewardBySet({"sums": Short()}), ["1", "2"], [TEXT, TEXT])


def test_weighted_sum_has_a_part_for_each_term():
    reward = WeightedSum([ExactMatch(), FormatReward("[15]", name="odd")], weights=[2.0, -0.5])
    prompts = [Prompt(text="?", answer=answer) for answer in "123"]
    rewards = evaluate_reward(reward, ["1", "5", "3"], prompts)
    assert [part.tolist() for part in rewards.parts.values()] == [[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    assert rewards.total.tolist() == [1.5, -0.5, 2.0] and rewards.correct.tolist() == [True, False, True]
    assert torch.equal(reward(["1", "5", "3"], prompts), rewards.total) and list(rewards.parts) == ["exact_match", "odd"]


def test_a_part_of_weight_0_is_a_metric_that_counts_in_accuracy_and_is_not_paid():
    graded = FunctionReward(
        lambda completions: [len(text) / 4 for text in completions], measures_correctness=False, name="graded"
    )
    prompts, texts = [Prompt(text="?", answer="1")] * 4, ["1", "1111", "1", "11"]
    alone = evaluate_reward(graded, texts, prompts)
    rewards = evaluate_reward(WeightedSum([graded, ExactMatch()], [1.0, 0.0]), texts, prompts)
    assert torch.equal(rewards.total, alone.total) and rewards.correct.tolist() == [True, False, True, False]
    assert rewards.parts["exact_match"].tolist() == [1.0, 0.0, 1.0, 0.0]
    for advantage in (GroupAdvantage(), PerRewardAdvantage()):
        one, other = (advantage.of_rewards(some.apply(lambda values: values[None])) for some in (rewards, alone))
        assert torch.equal(one, other)


def test_sums_in_sums_are_resolved_and_configs_describe_them():
    inner = WeightedSum([FormatReward("a", name="a"), FormatReward("b", name="b")], weights=[1.0, 3.0])
    reward = WeightedSum([ExactMatch(), inner], weights=[1.0, 0.5])
    assert [(term.name, weight) for term, weight in reward.terms()] == [("exact_match", 1.0), ("a", 0.5), ("b", 1.5)]
    config = WeightedSum([ExactMatch(ignore_case=True)], [0.5]).to_config()
    assert config["class_path"] == "hybrid_lightning.rewards.WeightedSum"
    assert config["init_args"]["rewards"][0]["init_args"] == {"ignore_case": True}


def test_bad_arguments():
    for build, message in (
        (lambda: WeightedSum([]), "at least one reward"),
        (lambda: WeightedSum([ExactMatch()], [1.0, 2.0]), r"weights=\[1.0, 2.0\] for 1 rewards"),
        (lambda: WeightedSum([ExactMatch()], [float("nan")]), "finite"),
        (lambda: WeightedSum([ExactMatch(), WeightedSum([ExactMatch()])]), "more than one is named exact_match"),
        (lambda: FormatReward("(a"), r"pattern='\(a' is not a regular expression"),
        (lambda: ExactMatch("(a)(b)"), "2 groups instead of 1"),
        (lambda: RewardBySet({}), "give each set a reward"),
        (lambda: RewardBySet({"a": WeightedSum([ExactMatch()])}), "the reward of set 'a' is a sum"),
        (lambda: RewardBySet({"a": ExactMatch(), "b": FormatReward("x")}), "some rewards measure correctness and others do not"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            build()
        assert "\n" not in str(caught.value)
