"""Rewards of the text: an answer that is compared as it stands, a format, and what is said again and again."""

import pytest

from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.rewards import ExactMatch, FormatReward, RepetitionPenalty
from hybrid_lightning.types import Prompt


def score(reward, completion, answer="12"):
    return reward([completion], [Prompt(text="?", answer=answer, index=4, source="s.csv")])[0]


@pytest.mark.parametrize(
    ("reward", "answer", "right", "wrong"),
    [
        (ExactMatch(), "12", ["12", "\t12 \n\n"], ["", " ", "120", "1 2", "012", "12.", "-12", "12 12", "12\nQ: 3+4", "Twelve"]),
        (ExactMatch(), "New York", ["New  York\n"], ["NewYork", "new york"]),
        (ExactMatch(ignore_case=True), " New York", ["new york"], ["NewYork"]),
        (ExactMatch(r"####\s*(\S+)"), "12", ["so\n#### 12", "#### 13 #### 12"], ["#### 12 #### 13", "12"]),
        (ExactMatch(r"\A\s*([^\n]*)"), "12", [" 12\nQ: next 13"], [""]),
        (ExactMatch(r"<answer>(.*?)</answer>"), "12", ["<answer>\n12\n</answer>"], ["12"]),
        (ExactMatch(r"(13)?$"), "12", [], ["12"]),
    ],
)
def test_an_answer_is_compared_as_it_stands(reward, answer, right, wrong):
    assert [score(reward, text, answer) for text in right] == [1.0] * len(right)
    assert [score(reward, text, answer) for text in wrong] == [0.0] * len(wrong)


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_a_row_without_an_answer_is_named(answer):
    with pytest.raises(RewardError, match=r"ExactMatch needs a reference answer, but s\.csv row 4 has none"):
        score(ExactMatch(), "12", answer)


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        (r"\A<think>.+</think>\s*\S", ["<think>a\nb</think>\n4"], ["<think></think>4", " <think>a</think>4"]),
        (
            r"\A\s*<think>(?:(?!</?think>).)+</think>\s*<answer>(?:(?!</?answer>).)+</answer>\s*\Z",
            ["<think>\n2+2\n</think>\n<answer>4</answer>", "<think>2+2</think><answer>4</answer>"],
            ["<answer>4</answer><think>2+2</think>", "<think>2+2<answer>4</answer>", "<think>a</think><think>b</think>4"],
        ),
    ],
)
def test_a_format_is_looked_for_across_lines(pattern, right, wrong):
    assert [score(FormatReward(pattern), text) for text in [*right, *wrong]] == [1.0] * len(right) + [0.0] * len(wrong)


def test_repetition():
    penalty = RepetitionPenalty(ngram_words=3)
    # 8 words, 6 trigrams: "a b c", "b c d", "c d a", "d a b" and then two of them again.
    texts = ["a b c d A B C D", "a b c d", "a b", "", "no no no no no"]
    assert penalty(texts, []) == pytest.approx([4 / 6 - 1, 0, 0, 0, 1 / 3 - 1])
    with pytest.raises(ConfigError, match="give"):
        RepetitionPenalty(0)
