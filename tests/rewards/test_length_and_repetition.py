import math

import pytest

from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.rewards import (
    CosineLength,
    ExactMatch,
    FormatReward,
    GroupLength,
    RepetitionPenalty,
    RewardFunction,
    WeightedSum,
    evaluate_reward,
)
from hybrid_lightning.types import Completion, Prompt

PROMPT = Prompt(text="?", answer="12")


def completions(*pairs):
    return [Completion(text, length, True) for text, length in pairs]


class Counting(RewardFunction):
    """Right if the text is 12; counts how often it is asked."""

    calls = 0

    def __call__(self, completions, prompts):
        self.calls += 1
        return [float(text == "12") for text in completions]


def test_the_cosine_runs_from_shortest_to_longest():
    texts = completions(("12", 0), ("12", 50), ("12", 100), ("13", 0), ("13", 50), ("13", 100), ("12", 130))
    result = evaluate_reward(CosineLength(ExactMatch(), max_tokens=100), texts, [PROMPT] * 7)
    assert result.total.tolist() == pytest.approx([1.0, 0.75, 0.5, -1.0, -0.75, -0.5, 0.5])
    assert result.correct.tolist() == [True, True, True, False, False, False, True]
    assert result.weights == {"exact_match": 0.0, "cosine_length": 1.0}


def test_the_cosine_of_the_paper():
    """CosFn(t, T, low, high) = low + (high - low) (1 + cos(t pi / T)) / 2, written out."""
    reward = CosineLength(ExactMatch(), 80, 2.0, 1.0, -10.0, 0.0, at_limit=-10.0)
    values = evaluate_reward(reward, completions(("12", 20), ("13", 20), ("12", 80)), [PROMPT] * 3).total.tolist()
    share = (1 + math.cos(math.pi / 4)) / 2
    assert values == pytest.approx([1 + share, -10 * share, -10.0])


def test_in_a_group_the_shorter_right_one_earns_more():
    other = Prompt(text="?", answer="12", index=1)
    texts = completions(("12", 10), ("12", 20), ("12", 30), ("13", 10), ("13", 30), ("12", 7), ("12", 7))
    prompts = [PROMPT] * 5 + [other] * 2
    result = evaluate_reward(GroupLength(ExactMatch(), weight=0.5), texts, prompts)
    assert result.parts["group_length"].tolist() == [0.5, 0.0, -0.5, 0.0, -0.5, 0.0, 0.0]
    assert result.total.tolist() == [1.25, 1.0, 0.75, 0.0, -0.25, 1.0, 1.0]


@pytest.mark.parametrize("wrap", [lambda reward: CosineLength(reward, 100), GroupLength])
def test_nothing_is_scored_twice_and_the_right_batch_is_remembered(wrap):
    inner = Counting()
    reward = WeightedSum([wrap(inner), FormatReward(r"\d")])
    for text, right in (("12", True), ("13", False)):
        result = evaluate_reward(reward, completions((text, 10)), [PROMPT])
        assert result.correct.tolist() == [right] and list(result.parts) == [
            "counting",
            reward.terms()[1][0].name,
            "format_reward",
        ]
    assert inner.calls == 2


@pytest.mark.parametrize("wrap", [lambda reward: CosineLength(reward, 100), GroupLength])
@pytest.mark.parametrize("reward", [FormatReward("x"), WeightedSum([ExactMatch()])])
def test_they_need_one_reward_for_correctness(wrap, reward):
    with pytest.raises(ConfigError, match="must be one reward that measures correctness"):
        wrap(reward)


def test_texts_without_a_length_are_refused():
    with pytest.raises(RewardError, match="CosineLength: completions are plain strings"):
        evaluate_reward(CosineLength(ExactMatch(), 100), ["12"], [PROMPT])


def test_repetition():
    penalty = RepetitionPenalty(ngram_words=3)
    # 8 words, 6 trigrams: "a b c", "b c d", "c d a", "d a b" and then two of them again.
    assert penalty(["a b c d A B C D", "a b c d", "a b", "", "no no no no no"], []) == pytest.approx(
        [4 / 6 - 1, 0, 0, 0, 1 / 3 - 1]
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda: RepetitionPenalty(0),
        lambda: CosineLength(ExactMatch(), 0),
        lambda: GroupLength(ExactMatch(), weight=0),
    ],
)
def test_bad_arguments(build):
    with pytest.raises(ConfigError, match="give"):
        build()


@pytest.mark.parametrize(
    ("text", "earned"),
    [
        ("<think>\n2+2\n</think>\n<answer>4</answer>", 1.0),
        ("<think>2+2</think><answer>4</answer>", 1.0),
        ("<answer>4</answer><think>2+2</think>", 0.0),
        ("<think>2+2<answer>4</answer>", 0.0),
        ("<think>2+2</think>4", 0.0),
        ("so <think>2+2</think><answer>4</answer>", 0.0),
        ("<think>a</think><think>b</think><answer>4</answer>", 0.0),
    ],
)
def test_think_and_answer_tags(text, earned):
    tags = r"\A\s*<think>(?:(?!</?think>).)+</think>\s*<answer>(?:(?!</?answer>).)+</answer>\s*\Z"
    assert FormatReward(tags)([text], [PROMPT]) == [earned]
