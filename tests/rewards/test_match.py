"""`MathMatch`: a table of right and wrong answers, and properties that hold for any completion."""

import copy
import json
import multiprocessing
import os
import pickle
import re
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
from public_data import public_data

from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.rewards import ArrivingRewards, MathMatch, MultipleChoice, evaluate_reward
from hybrid_lightning.rewards.mathematics import match as module
from hybrid_lightning.types import Completion, Prompt

# A line for each reference answer: completions that are right, and completions that must earn nothing.
CASES = [json.loads(line) for line in Path(__file__).with_name("math_cases.jsonl").read_text().splitlines()]


def score(completion, answer="12", **arguments):
    return MathMatch(**arguments)([completion], [Prompt(text="?", answer=answer, index=4, source="s.csv")])[0]


@pytest.mark.parametrize(("verdict", "value"), [("right", 1.0), ("wrong", 0.0)])
def test_verdicts(verdict, value):
    pairs = [(case["gold"], text) for case in CASES for text in case[verdict]]
    scores = MathMatch()([text for _, text in pairs], [Prompt(text="?", answer=gold) for gold, _ in pairs])
    assert len(pairs) > 400 and [pair for pair, got in zip(pairs, scores, strict=True) if got != value] == []


def test_a_pattern_limits_what_counts_and_a_row_without_an_answer_is_named():
    assert score("so 12\n#### 13", pattern=r"####\s*(.+)") == 0.0
    assert score("13?\n#### 12", pattern=r"####\s*(.+)") == 1.0
    assert score("12", pattern=r"####\s*(.+)") == 0.0
    with pytest.raises(RewardError, match=r"MathMatch needs a reference answer, but s\.csv row 4 has none"):
        evaluate_reward(MathMatch(), ["12"], [Prompt(text="?", index=4, source="s.csv")])


def test_an_answer_that_is_not_mathematics_is_named():
    for answer in ["hello", "?", "north of 12", "2020-01-01", "()"]:
        with pytest.raises(RewardError, match=r"of s\.csv row 4 is neither a number nor a formula") as caught:
            score("12", answer)
        assert repr(answer) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_more_than_a_number_is_refused_with_a_remedy():
    said = r"answer_pattern='.*' for the number at its beginning, or use ExactMatch"
    for answer in (
        *("3 (mod 5)", "3 (mod p)", "10 (base two)", "12 (9 eggs)", "3 (R 2)", "3 (or 4)", "3 (about)", "2 (sin x)"),
        *("2^5 (apples)", "15 (goldfish); 12 (platies)", "3x (apples)", "1 hour and 30 minutes"),
    ):
        with pytest.raises(RewardError, match=said) as caught:
            MathMatch().check_prompt(Prompt(text="?", answer=answer))
        pattern = re.search(r"answer_pattern='(.*?)' for", str(caught.value))[1]
        assert re.match(pattern, answer)[1] == re.match(r"\d+", answer)[0]


def test_what_takes_too_long_earns_nothing_and_later_ones_are_scored(caplog):
    assert score("$(x+y)^{3000}$", cpu_seconds=0.5) == 0.0
    assert score("12", cpu_seconds=0.5) == 1.0
    assert not caplog.text or "gave up after 0.5 s" in caplog.text


def scored(number):
    return MathMatch()([str(number), str(number + 1)] * 20, [Prompt(text="?", answer=str(number))] * 40)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_threads_share_it_and_a_fork_starts_its_own():
    for pool in (ThreadPoolExecutor(4), ProcessPoolExecutor(1, multiprocessing.get_context("fork"))):
        with pool:
            assert list(pool.map(scored, range(4), timeout=20)) == [[1.0, 0.0] * 20] * 4
    assert scored(12) == [1.0, 0.0] * 20


def last_worker():
    """That answered last."""
    return module._verifier(3.0)._idle.queue[-1]


def test_several_compare_at_the_same_time_and_while_others_are_generated(monkeypatch):
    reward, together = MathMatch(), threading.Barrier(2)
    reward.concurrency = 2
    assert 0 < reward.overlaps(Prompt(text="?")) <= reward.concurrency
    ask = module._Worker.ask
    monkeypatch.setattr(module._Worker, "ask", lambda *given: together.wait(20) is not None and ask(*given))
    prompts = [Prompt(text="?", answer=answer) for answer in ("12", "13")]
    arriving = ArrivingRewards(reward, prompts)
    assert evaluate_reward(reward, ["12", "12"], prompts).total.tolist() == [1.0, 0.0]
    assert evaluate_reward(reward, ["13", "13"], prompts, arriving=arriving).total.tolist() == [0.0, 1.0]


def test_an_interrupted_comparison_does_not_answer_the_next_and_a_process_that_died_is_replaced(monkeypatch):
    assert score("12") == 1.0
    process = last_worker().process
    monkeypatch.setattr(process.stdout, "readline", Mock(side_effect=KeyboardInterrupt))  # after the request is written
    with pytest.raises(KeyboardInterrupt):
        score("12")
    assert score("13") == 0.0 and score("12") == 1.0
    process = last_worker().process
    os.kill(process.pid, 9)
    process.wait()
    assert score("12") == 1.0


def test_it_is_silent(capfd):
    for text in ("12", r"\boxed{\frac{1}{", "$\\undefined{3}$"):
        score(text)
    assert capfd.readouterr() == ("", "")


def test_it_can_be_copied_and_refuses_bad_arguments():
    reward = MathMatch(name="right")
    score("12")
    for other in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert other.name == "right" and other(["12"], [Prompt(text="?", answer="12")]) == [1.0]
    for arguments, message in (({"cpu_seconds": 0.0}, "cpu_seconds=0.0"), ({"pattern": "12"}, "0 groups")):
        with pytest.raises(ConfigError, match=message):
            MathMatch(**arguments)


def test_gsm8k_answers_and_solutions():
    solutions = [json.loads(line)["answer"] for line in Path(public_data("gsm8k/train.jsonl")).read_text().splitlines()[::50]]
    answers = [re.search(r"####\s*(.+)", text).group(1) for text in solutions]
    prompts = [Prompt(text="?", answer=answer, index=index) for index, answer in enumerate(answers)]
    reward = MathMatch()
    for form, value in (("That makes ${}.", 1.0), ("{}1", 0.0), ("{} or 0.125", 0.0)):
        assert reward([form.format(answer) for answer in answers], prompts) == [value] * len(answers), form
    assert reward(solutions, prompts) == [1.0] * len(answers)


END = [*(" ", "\n", "\u00a0", "}", "$5 ", "x^2^", "18 m ", r"\text{a", r"\boxed{5 m", "5 dollars a ", "is at least 5 ", "18 (")]
END += ["5 or more ", "(", r"\boxed{", "$", "A or "]


@pytest.mark.parametrize("part", END)
def test_texts_without_end_cost_no_time(part, caplog):
    texts = [part * 3_000, "12" + " " * 20_000, r"\boxed{12}" + part.replace("boxed", "text") * 2_000]
    scores = MathMatch(cpu_seconds=2.0)(texts, [Prompt(text="?", answer="12")] * 3)
    assert scores[:2] == [0.0, 1.0] and not caplog.text


def test_what_stands_far_before_the_end_or_the_last_box_is_not_looked_at():
    texts = ["3 and 9 make\n" * 3_000 + "12", r"\boxed{12}" + " 7 of them" * 3_000]
    texts += ["7 \\boxed{8} " * 3_000 + "\n" + r"\boxed{12}"]
    assert MathMatch(cpu_seconds=2.0)(texts, [Prompt(text="?", answer="12")] * 3) == [1.0, 1.0, 1.0]


def test_reasoning_that_the_prompt_began_and_that_has_no_end_is_not_an_answer():
    for reward, answer in ((MathMatch(), "12"), (MultipleChoice(), "C")):
        prompt = Prompt(text="?", answer=answer)
        texts = [f"It is {answer}, or so", f"It is 5</think>{answer}", f"It is {answer}</think>5"]
        cut = [Completion(text, num_tokens=9, finished=False, thinking=True) for text in texts]
        assert reward(cut, [prompt] * 3) == [0.0, 1.0, 0.0]
        assert reward(pickle.loads(pickle.dumps(cut)), [prompt] * 3) == [0.0, 1.0, 0.0]
        assert reward.extract_answer(cut[0], prompt) is None
        assert reward([Completion(texts[0], num_tokens=9, finished=True)], [prompt]) == [1.0]
