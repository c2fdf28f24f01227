import pytest

from hybrid_lightning.errors import RewardError
from hybrid_lightning.rewards import ExactMatch, FormatReward
from hybrid_lightning.types import Prompt


def score(reward, completion, answer="12"):
    return reward([completion], [Prompt(text="?", answer=answer, index=4, source="s.csv")])[0]


@pytest.mark.parametrize("completion", ["12", " 12", "12\n", "\t12 \n\n"])
def test_right(completion):
    assert score(ExactMatch(), completion) == 1.0


@pytest.mark.parametrize(
    "completion", ["", " ", "120", "1 2", "012", "12.", "12.0", "-12", "12 12", "12\nQ: 3+4", "Twelve", "1\n2"]
)
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
