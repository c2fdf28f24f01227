"""What a majority vote counts as the same answer."""

import pytest

from hybrid_lightning.errors import RewardError
from hybrid_lightning.rewards import ExactMatch, FormatReward, MathMatch, RewardFunction, WeightedSum, extract_answers
from hybrid_lightning.types import Prompt

PROMPT = Prompt(text="?", answer="3/4", source="quiz", index=7)


class Sloppy(RewardFunction):
    """Without a word on answers."""

    def __call__(self, completions, prompts):
        return [0.0] * len(completions)


def answers(reward, *completions):
    return extract_answers(reward, completions, [PROMPT] * len(completions))


def test_a_reward_that_takes_nothing_out_of_the_text_counts_the_text():
    assert answers(Sloppy(), " 12\n", "12", "twelve", " \n") == ["12", "12", "twelve", None]


def test_exact_match_counts_what_it_compares():
    assert answers(ExactMatch(), " a  b", "a b", "A b", "") == ["a b", "a b", "A b", None]
    lenient = ExactMatch(r"<(.*?)>", ignore_case=True)
    assert answers(lenient, "<a> or <B>", "<b >", "b", "< >") == ["b", "b", None, None]


def test_numbers_and_formulas_agree_however_they_are_written():
    spellings = ["It is 0.75.", r"so $\frac{6}{8}$", r"\boxed{3/4}", "$x = 0.75$", "0.7500001", r"\boxed{75\%}"]
    assert len(set(answers(MathMatch(), *spellings))) == 1
    assert len(set(answers(MathMatch(), "0.75", "0.76", "-0.75", "75", "$x+1$", "$1 + x$"))) == 5
    assert answers(MathMatch(), "", "no idea", " ") == [None] * 3
    assert answers(MathMatch(r"A:(.*)"), "A: 5", "5") == answers(MathMatch(r"A:(.*)"), "so 4. A: 5.0", "6")


def test_answers_too_large_or_too_hard_are_no_failure():
    large, _, none = answers(MathMatch(cpu_seconds=0.5), r"\boxed{10^{400}}", r"\boxed{9^{9^{9}}}", "")
    assert large is not None and none is None
    assert answers(MathMatch(cpu_seconds=0.5), "5") == answers(MathMatch(), "5.0")


def test_of_a_sum_the_part_that_measures_correctness_is_asked():
    reward = WeightedSum([FormatReward(r"\d+"), ExactMatch(r"(\d+)")])
    assert answers(reward, "it is 12") == ["12"]
    assert answers(WeightedSum([FormatReward(r"\d+")]), "it is 12") == ["it is 12"]


@pytest.mark.parametrize(("found", "message"), [(12, "returned 12 for quiz row 7"), (ValueError("no"), "raised ValueError: no")])
def test_what_is_no_text_is_refused_with_the_row(found, message):
    class Own(Sloppy):
        def extract_answer(self, completion, prompt):
            if isinstance(found, Exception):
                raise found
            return found

    with pytest.raises(RewardError, match=message):
        answers(Own(), "x")
