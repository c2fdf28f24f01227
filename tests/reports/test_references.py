"""What the reward pays for reference answers, in the form that the prompt asks for."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import Constant, Talk, build_policy

from hybrid_lightning import rewards
from hybrid_lightning.data import FormatBySet, PlainFormat
from hybrid_lightning.reports.references import has_paid, reference_answers, reference_rewards
from hybrid_lightning.rewards import ExactMatch, RewardBySet, RewardFunction
from hybrid_lightning.types import Prompt, Rewards

BOXED = "What is it? Write it in \\boxed{}"
SHOWN = PlainFormat("{question}", few_shot=[{"question": "1+1", "answer": "2"}], answer_template=" so: {answer}")


class Distance(RewardFunction):
    """Never above 0, and 0 for the answer."""

    def __call__(self, completions, prompts):
        random.random()
        return [-abs(float(text) - float(prompt.answer)) for text, prompt in zip(completions, prompts, strict=True)]


class MinusLength(RewardFunction):
    """Does not look at answers, and is never above 0."""

    def __call__(self, completions, prompts):
        return [-float(len(text)) for text in completions]


class Half(RewardFunction):
    """Like a judge that grades style, and fails on answers that are a single digit."""

    max_failed_share = 0.5
    failure = "status 500, 'boom'"

    def __init__(self, measures_correctness: bool = False, high: float = 0.0) -> None:
        self.measures_correctness, self.high = measures_correctness, high

    def __call__(self, completions, prompts):
        return [math.nan if len(text) == 1 else self.high for text in completions]


class Unreachable(RewardFunction):
    def __call__(self, completions, prompts):
        raise ConnectionRefusedError("nobody listens")


class Fails(RewardFunction):
    def __call__(self, completions, prompts):
        raise KeyError("no such column")


def rows(answers, text="What is it?", **fields):
    return [Prompt(text=text, answer=answer, index=place, source="rows", **fields) for place, answer in enumerate(answers)]


def found(model, reward, prompts, form=None, pays=False, **policy):
    result = reference_rewards(build_policy(model, reward=reward, **policy).task.generation, prompts, form, 8, pays)
    return result, [(finding.kind, finding.level) for finding in result.findings]


@pytest.mark.parametrize(
    ("reward", "prompts", "form"),
    [
        (ExactMatch(), rows(["12", "7"]), None),
        (ExactMatch(r"so: (.*)"), rows(["12"], set_name="a"), FormatBySet({"a": SHOWN})),
        (rewards.MathMatch(r"\\boxed\{(.*)\}"), rows(["12", r"\frac{1}{2}"], BOXED), None),
        (ExactMatch("<answer>(.*?)</answer>"), rows(["7"], "Think in <think> </think>, write <answer> </answer>"), None),
        (rewards.WeightedSum([ExactMatch(), rewards.FormatReward("<think>")]), rows(["7"]), None),
        (rewards.CodeTests(), rows(["def f(x): return 2 * x"], columns={"test": "assert f(2) == 4"}), None),
        (ExactMatch(), [Prompt(text="?", answer="12", completions=("12",))], None),
        (Distance(), rows(["12", "7"]), None),
    ],
)
def test_reference_answers_that_are_paid_as_they_should(model, reward, prompts, form):
    state = random.getstate()
    result, kinds = found(model, reward, prompts, form)
    assert kinds == [] and result.note.startswith(f"{len(prompts)} of {len(prompts)} reference answers are paid")
    assert random.getstate() == state


def test_a_reward_that_pays_nothing_for_the_reference_answer_can_pay_for_nothing(model):
    for reward, answers in ((Constant(), ["12", "7"]), (Constant(-1.0), ["1", "2"])):
        result, kinds = found(model, reward, rows(answers))
        assert kinds == [("reference", "error")]
        assert "gives the reference answer 0: it cannot pay for anything" in str(result.findings[0])
    _, kinds = found(model, Constant(), rows(["12", "7"]), pays=True)
    assert kinds == [("reference", "note")], "it has paid for completions"


def test_a_form_that_the_prompt_does_not_ask_for_is_named_and_a_pattern_may_look_for_one_that_nobody_knows(model):
    result, kinds = found(model, ExactMatch(r"#### (\d+)"), rows(["7", "8"]))
    assert kinds == [("reference", "warning")] and "pays for '#### 7'" in result.findings[0].text
    for reward in (ExactMatch(r"FINAL: (\d+)"), RewardBySet({"a": ExactMatch("<(.*)>")})):
        result, kinds = found(model, reward, rows(["7"], set_name="a"))
        assert kinds == [("reference", "warning")] and "0 in all known forms" in result.findings[0].text


def test_a_reward_that_pays_for_wrong_answers_as_well_does_not_look_at_them(model):
    result, kinds = found(model, Constant(1.0), rows(["12", "7", "7"]))
    assert kinds == [("accident", "warning")] and "row's own in 3 of 3 rows" in result.findings[0].text
    assert "'7' for '12'" in result.findings[0].text
    assert found(model, Constant(1.0), rows(["7", "7"]))[1] == [], "no row has another answer"


def test_answers_that_prompts_contain_or_that_most_rows_share():
    def seen(texts, answers, accuracy=0.0):
        rows = [Prompt(text=text, answer=answer) for text, answer in zip(texts, answers, strict=True)]
        result = reference_answers(rows, accuracy)
        return result.note, [(finding.kind, finding.level) for finding in result.findings]

    sums = [f"{n} + {n % 7}" for n in range(50, 90)]
    assert seen([f"Add {text} =" for text in sums], sums)[1] == [("copy", "warning")], "the wrong column"
    targets = [f"Use {3 * n}, {n - 5} and {7 * n} to make {n}." for n in range(50, 90)]
    assert seen(targets, map(str, range(50, 90)))[1] == [("copy", "note")], "a target"
    assert seen([f"{n}+{n % 7}=" for n in range(50, 90)], [str(n + n % 7) for n in range(50, 90)])[1] == []
    assert seen([f"Is {n} even? A) yes B) no" for n in range(40)], ["A", "B"] * 20, accuracy=0.6)[1] == [], "options"
    note, kinds = seen(sums, ["4"] * 21 + ["3", "5"] * 9 + ["6"], accuracy=0.2)
    assert note == "52.5% of 40 reference answers are '4', the most frequent one" and kinds == [("constant", "warning")]
    assert seen(sums, ["4"] * 21 + ["3"] * 19, accuracy=0.6)[1] == [] == seen(sums, ["4"] * 40, accuracy=1.0)[1]
    assert seen(sums, ["4"] * 40, accuracy=None)[1] == [], "no accuracy to compare with"
    assert seen(sums, [None] * 40) == ("not applicable: the data has none (answer_column)", [])


def test_single_rows_and_rewards_that_fail_are_named(model):
    result, kinds = found(model, ExactMatch(r"\A(\d+)\Z"), rows(["7", "8", "1,234"]))
    assert kinds == [("reference", "note")] and "1 of 3 rows, first rows row 2, '1,234'" in result.findings[0].text
    _, kinds = found(model, ExactMatch(r"\A(\d+)\Z"), rows(["7", "x", "1,234"]))
    assert kinds == [("reference", "warning")]
    result, kinds = found(model, Fails(), rows(["7"]))
    assert kinds == [("reference", "warning")] and "no such column" in str(result.findings[0])


def test_a_reward_that_does_not_look_at_answers_is_named_and_no_row_is_blamed(model):
    for answers in (["12", "7", "123", "1", "45"], ["1", "22", "333", "4444"], ["4444", "333", "22", "1"]):
        for pays in (False, True):
            result, kinds = found(model, MinusLength(), rows(answers), pays=pays)
            assert kinds == [("accident", "warning")] and "it does not check the answer" in result.findings[0].text
    _, kinds = found(model, MinusLength(), rows(["12", "45"]), pays=True)
    assert kinds == [("accident", "warning")], "of equal length, but completions earned differently"
    _, kinds = found(model, Distance(), rows(["7", "8", "9"]))
    assert kinds == []


def test_what_has_paid_is_no_reward_that_cannot_pay():
    def paid(values, counted=None):
        total = torch.tensor(values)
        rewards = Rewards(total, {"half": total}, total >= 1, counted=counted)
        return has_paid(
            SimpleNamespace(reward_terms=lambda: [Half(), Half(True)][: 1 + (counted is None)]), SimpleNamespace(scored=rewards)
        )

    assert paid([0.0, 0.0323]) and paid([-3.0, -5.0]) and paid([0.0, -1.0])
    assert not paid([0.0, 0.0]) and not paid([-1.0, -1.0]) and not paid([1.0, 0.0], torch.tensor([False, True]))


def test_reference_answers_need_no_pay_where_nothing_measures_correctness(model):
    for pays in (True, False):
        assert found(model, Half(), rows(["12", "345"]), pays=pays)[1] == [("reference", "note")]
    assert found(model, Half(high=0.5), rows(["12", "345"]))[1] == [("accident", "note")]
    assert found(model, Half(True), rows(["12", "345"]), pays=True)[1] == [("reference", "note")], "a graded reward that paid"


def test_a_server_that_fails_is_named_and_neither_reward_nor_row(model):
    result, kinds = found(model, Half(), rows(["1", "2", "3", "45"]))
    assert kinds == [("judge", "warning")] and "failed on 3 of 4 completions" in result.findings[0].text
    assert "status 500, 'boom'" in result.findings[0].text and "correct the reward" not in str(result.findings[0])
    result, kinds = found(model, Half(True, 1.0), rows(["1", "23", "45", "67"]))
    assert kinds == [("accident", "warning")] and result.note.startswith("3 of 3 reference answers are paid")
    assert result.note.endswith("; 1 could not be scored"), "and is not among those that earn nothing"
    result, kinds = found(model, Unreachable(), rows(["12"]))
    assert kinds == [("judge", "warning")] and "nobody listens" in result.findings[0].text


def test_where_it_does_not_apply_this_is_said(model):
    assert found(model, Constant(), rows([None, " "]))[0].note.startswith("not applicable: the data has no reference answers")
    acting = {"environment": Talk(), "turn_template": "{content}"}
    assert found(model, Constant(), rows(["7"]), **acting)[0].note.startswith("not applicable: the reward of an episode")
