"""Rewards of the text: an answer that is compared as it stands, a format, and repetition."""

import pytest

from hybrid_lightning.errors import RewardError
from hybrid_lightning.rewards import ExactMatch, FormatReward, RepetitionPenalty
from hybrid_lightning.types import Completion, Prompt


def score(reward, completion, answer="12"):
    return reward([completion], [Prompt(text="?", answer=answer, index=4, source="s.csv")])[0]


def test_an_answer_is_compared_as_it_stands():
    for reward, answer, right, wrong in (
        (ExactMatch(), "12", ["12", "\t12 \n\n"], ["", " ", "120", "1 2", "12.", "-12", "12 12", "12\nQ: 3+4"]),
        (ExactMatch(), "New York", ["New  York\n"], ["NewYork", "new york"]),
        (ExactMatch(ignore_case=True), " New York", ["new york"], ["NewYork"]),
        (ExactMatch(r"####\s*(\S+)"), "12", ["so\n#### 12", "#### 13 #### 12"], ["#### 12 #### 13", "12"]),
        (ExactMatch(r"\A\s*([^\n]*)"), "12", [" 12\nQ: next 13"], [""]),
        (ExactMatch(r"<answer>(.*?)</answer>"), "12", ["<answer>\n12\n</answer>"], ["12"]),
        (ExactMatch(r"(13)?$"), "12", [], ["12"]),
    ):
        assert [score(reward, text, answer) for text in [*right, *wrong]] == [1.0] * len(right) + [0.0] * len(wrong)
    for none in (None, "", "  "):
        with pytest.raises(RewardError, match=r"ExactMatch needs a reference answer, but s\.csv row 4 has none"):
            score(reward, "12", none)


def test_a_format_is_looked_for_across_lines():
    reward = FormatReward(r"\A<think>.+</think>\s*\S")
    texts = ["<think>a\nb</think>\n4", "<think></think>4", " <think>a</think>4"]
    assert [score(reward, text) for text in texts] == [1.0, 0.0, 0.0]


def test_a_format_may_begin_in_the_prompt():
    reward, lines = FormatReward(r"\A<think>.+</think>\s*\S"), FormatReward(r"\A<think>\n.+\n</think>\n4\Z")
    texts = [Completion("a\n</think>\n4", 5, True, thinking=thinking) for thinking in (True, False)]
    assert reward(texts, []) == lines(texts, []) == [1.0, 0.0]
    assert reward([Completion("a", 1, True, thinking=True)], []) == [0.0]
    assert FormatReward(r"\A(?!<think>).+</think>")(texts, []) == [1.0, 1.0], "written for such templates alone"


def test_repetition():
    penalty = RepetitionPenalty(ngram_words=3)
    # 8 words, 6 trigrams: "a b c", "b c d", "c d a", "d a b" and then two of them again.
    texts = ["a b c d A B C D", "a b c d", "a b", "", "no no no no no"]
    assert penalty(texts, []) == pytest.approx([4 / 6 - 1, 0, 0, 0, 1 / 3 - 1])
