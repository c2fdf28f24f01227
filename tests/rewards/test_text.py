"""Rewards of the text: an answer that is compared as it stands, a format, and what is said again and again."""

import pytest

from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.rewards import ExactMatch, FormatReward, RepetitionPenalty
from hybrid_lightning.types import Prompt


def score(reward, completion, answer="12"):
    return reward([completion], [Prompt(text="?", answer=answer, index=4, source="s.csv")])[0]


@pytest.mark.parametrize("completion", ["12", " 12", "12\n", "\t12 \n\n"])
def test_right(completion):
    assert score(ExactMatch(), completion) == 1.0


@pytest.mark.parametrize("completion", ["", " ", "120", "1 2", "012", "12.", "12.0", "-12", "12 12", "12\nQ: 3+4", "Twelve"])
def test_wrong(completion):
    assert score(ExactMatch(), completion) == 0.0


def test_inner_space_and_case():
    assert score(ExactMatch(), "New  York\n", "New York") == 1.0
    assert score(ExactMatch(), "NewYork", "New York") == 0.0
    assert score(ExactMatch(), "new york", "New York") == 0.0
    assert score(ExactMatch(ignore_case=True), "new york", " New York") == 1.0


@pytest.mark.parametrize(
    ("pattern", "completion", "value"),
    [
        (r"####\s*(\S+)", "so\n#### 12", 1.0),
        (r"####\s*(\S+)", "#### 12 #### 13", 0.0),
        (r"####\s*(\S+)", "#### 13 #### 12", 1.0),
        (r"####\s*(\S+)", "12", 0.0),
        (r"\A\s*([^\n]*)", " 12\nQ: next 13", 1.0),
        (r"\A\s*([^\n]*)", "", 0.0),
        (r"<answer>(.*?)</answer>", "<answer>\n12\n</answer>", 1.0),
        (r"(13)?$", "12", 0.0),
    ],
)
def test_pattern(pattern, completion, value):
    assert score(ExactMatch(pattern), completion) == value


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_a_row_without_an_answer_is_named(answer):
    with pytest.raises(RewardError, match=r"ExactMatch needs a reference answer, but s\.csv row 4 has none"):
        score(ExactMatch(), "12", answer)


def test_format_reward_searches_across_lines():
    reward = FormatReward(r"\A<think>.+</think>\s*\S")
    assert [score(reward, text) for text in ("<think>a\nb</think>\n4", "<think></think>4", " <think>a</think>4")] == [1, 0, 0]


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
    assert score(FormatReward(tags), text) == earned


def test_repetition():
    penalty = RepetitionPenalty(ngram_words=3)
    # 8 words, 6 trigrams: "a b c", "b c d", "c d a", "d a b" and then two of them again.
    texts = ["a b c d A B C D", "a b c d", "a b", "", "no no no no no"]
    assert penalty(texts, []) == pytest.approx([4 / 6 - 1, 0, 0, 0, 1 / 3 - 1])
    with pytest.raises(ConfigError, match="give"):
        RepetitionPenalty(0)
