import copy
import json
import multiprocessing
import os
import pickle
import re
import threading
from pathlib import Path

import pytest

from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.rewards import MathMatch, evaluate_reward
from hybrid_lightning.rewards.mathematics import match as module
from hybrid_lightning.types import Prompt

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"


def score(completion, answer="12", **arguments):
    return MathMatch(**arguments)([completion], [Prompt(text="?", answer=answer, index=4, source="s.csv")])[0]


@pytest.mark.parametrize(
    "completion",
    [
        "12",
        "12.",
        "12.0",
        "12.00",
        "012",
        "\n12\n",
        "$12",
        "$12.00",
        "12 dollars",
        "**12**",
        "#### 12",
        "answer:12",
        "Answer: **12**.",
        "The final answer is 12. I hope it is correct.",
        "= 12",
        "6+6=12",
        "24/2",
        "1.2e1",
        "x=12",
        "$12$",
        r"\(12\)",
        "$x = 12$",
        r"\frac{24}{2}",
        r"\boxed{12}",
        r"\boxed{12 \text{ apples}}",
        r"\boxed{\frac{24}{2}}",
        r"\boxed{12}, again \boxed{12}",
        "(12)",
        '"12"',
        "`12`",
        "+12",
        "####12",
        "\u224812",
        "<answer>12</answer>",
        "<answer>\n$12$\n</answer>",
        "3 and 4 make 7, plus 5 is 12",
        "13? No: 12",
    ],
)
def test_right(completion):
    assert score(completion) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        " \n",
        "120",
        "112",
        "1 2",
        "1,2",
        "12 000",
        "1,200",
        "-12",
        "\u221212",
        "- 12",
        "= - 12",
        "(-12)",
        "12_000",
        "12'000",
        r"12\,000",
        "12{,}000",
        "12.000.000",
        "12.0.1",
        "12.5",
        "12,5",
        "11.9999999",
        "12e3",
        "12:30",
        "12\u201313",
        "12\u00d710",
        "12^2",
        "12/0",
        "12/13",
        "A12",
        "twelve",
        "12 or 13",
        "12, 13",
        "12 (or 13)",
        "12 13",
        "12\n13",
        "between 12 and 13",
        "The answer is 12 or 13",
        "The final answer is 12. I hope it is correct. 13",
        r"\boxed{13}, not 12",
        r"\boxed{12} or \boxed{13}",
        r"\boxed{13} \boxed{12}",
        "$12$ or $13$",
        r"$\{12, 13\}$",
        r"\boxed{}",
        "I don't know.",
        "(((((",
        "$$$$",
        "\x00\ud800",
    ],
)
def test_wrong(completion):
    assert score(completion) == 0.0


@pytest.mark.parametrize(
    ("answer", "completion", "value"),
    [
        ("1,234", "1234", 1.0),
        ("1234", "1,234", 1.0),
        ("1234", "1 234", 1.0),
        ("1 234", "1234.0", 1.0),
        ("1234", "1_234", 1.0),
        ("1234", r"$1{,}234$", 1.0),
        ("1234", r"1\,234", 1.0),
        ("1234", "1,2345", 0.0),
        ("1234", "1 2345", 0.0),
        ("1234", "1,234,5", 0.0),
        ("1,234,567.89", "$1234567.89", 1.0),
        ("5.0", "5", 1.0),
        ("$18", "18", 1.0),
        ("-$18", "-18", 1.0),
        ("-18", "-$18", 1.0),
        ("-18", "$18", 0.0),
        ("\u22125", "-5", 1.0),
        ("0", "0", 1.0),
        ("0", "", 0.0),
        ("0", "-0.0", 1.0),
        ("0", "none", 0.0),
        ("070", "70", 1.0),
        ("1e6", "1000000", 1.0),
        ("1000000", "1e6", 1.0),
        ("100000000", "100000001", 0.0),
        ("5 apples", "5", 1.0),
        ("5 apples", "6 apples", 0.0),
        (r"5 \text{ square units}", "5", 1.0),
        ("2/3 cup", "2/3", 1.0),
        ("1/2", "0.5", 1.0),
        (r"\frac{1}{2}", "1/2", 1.0),
        (r"$\frac{1}{2}$", "2/4", 1.0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        ("1/3", "0.333333", 1.0),
        ("1/3", "0.333", 0.0),
        ("0.5", "50%", 1.0),
        ("50%", "50", 1.0),
        ("50%", "0.5", 1.0),
        ("50%", "5", 0.0),
        ("2:3", "2:3", 1.0),
        ("10:30", "10:45", 0.0),
        ("x=5", "5", 1.0),
        (r"\sqrt{2}", r"$\sqrt{2}$", 1.0),
        (r"\sqrt{2}", r"\boxed{2^{1/2}}", 1.0),
        ("x^2+1", "$1+x^2$", 1.0),
        ("x^2+1", "$x^2-1$", 0.0),
        ("(1,2)", "$(1, 2)$", 1.0),
        ("(1,2)", "$(2, 1)$", 0.0),
        (r"\{1, 2\}", r"$\{2, 1\}$", 1.0),
        ("A", r"\boxed{A}", 1.0),
        ("A", r"\boxed{B}", 0.0),
    ],
)
def test_forms_of_answers(answer, completion, value):
    assert score(completion, answer) == value


def test_pattern_limits_what_counts():
    assert score("so 12\n#### 13", pattern=r"####\s*(.+)") == 0.0
    assert score("13?\n#### 12", pattern=r"####\s*(.+)") == 1.0
    assert score("12", pattern=r"####\s*(.+)") == 0.0


@pytest.mark.parametrize("answer", ["hello", "Yes", "?", "north of 12", "2020-01-01", "()"])
def test_an_answer_that_is_no_mathematics_is_named(answer):
    with pytest.raises(RewardError, match=r"of s\.csv row 4 is neither a number nor a formula") as caught:
        score("12", answer)
    assert repr(answer) in str(caught.value) and "\n" not in str(caught.value)


def test_a_row_without_an_answer_is_named():
    with pytest.raises(RewardError, match=r"MathMatch needs a reference answer, but s\.csv row 4 has none"):
        evaluate_reward(MathMatch(), ["12"], [Prompt(text="?", index=4, source="s.csv")])


@pytest.mark.parametrize("bomb", ["$9^{9^{9^9}}$", "9**9**9**9", "$(x+y)^{3000}$"])
def test_what_takes_too_long_earns_nothing_and_later_ones_are_scored(bomb, caplog):
    assert score(bomb, cpu_seconds=0.5) == 0.0
    assert score("12", cpu_seconds=0.5) == 1.0
    assert not caplog.text or "gave up after 0.5 s" in caplog.text


def test_threads_share_it():
    results = {}

    def run(number):
        reward = MathMatch()
        prompts = [Prompt(text="?", answer=str(number))] * 40
        results[number] = reward([str(number), str(number + 1)] * 20, prompts)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [1.0, 0.0] * 20 for number in range(4)}


def in_fork(queue):
    queue.put(score("12"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_starts_its_own():
    assert score("12") == 1.0
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_fork, args=(queue,))
    child.start()
    assert queue.get(timeout=20) == 1.0
    child.join()
    assert score("12") == 1.0 and score("13") == 0.0


def test_an_interrupted_comparison_does_not_answer_the_next(monkeypatch):
    assert score("12") == 1.0
    verifier = module._verifier(3.0)
    exchange = verifier._exchange

    def interrupted(process, request):
        process.stdin.write(request + "\n")
        process.stdin.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(verifier, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score("12")
    monkeypatch.setattr(verifier, "_exchange", exchange)
    assert score("13") == 0.0 and score("12") == 1.0


def test_a_process_that_died_is_replaced():
    score("12")
    verifier = module._verifier(3.0)
    os.kill(verifier._process.pid, 9)
    verifier._process.wait()
    assert score("12") == 1.0


def test_it_is_silent(capfd):
    for text in ("12", r"\boxed{\frac{1}{", "$\\undefined{3}$"):
        score(text)
    assert capfd.readouterr() == ("", "")


def test_it_can_be_copied():
    reward = MathMatch(name="right")
    score("12")
    for other in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert other.name == "right" and other(["12"], [Prompt(text="?", answer="12")]) == [1.0]


@pytest.mark.parametrize(("arguments", "message"), [({"cpu_seconds": 0.0}, "cpu_seconds=0.0"), ({"pattern": "12"}, "0 groups")])
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        MathMatch(**arguments)


def test_gsm8k_answers_and_solutions():
    if not GSM8K.exists():
        pytest.skip(f"{GSM8K} is not here")
    solutions = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()[::10]]
    answers = [re.search(r"####\s*(.+)", text).group(1) for text in solutions]
    prompts = [Prompt(text="?", answer=answer, index=index) for index, answer in enumerate(answers)]
    reward = MathMatch()
    assert reward(answers, prompts) == [1.0] * len(answers)
    assert reward(solutions, prompts) == [1.0] * len(answers)
    assert reward([f"That makes ${answer}." for answer in answers], prompts) == [1.0] * len(answers)
    assert reward([f"{answer}1" for answer in answers], prompts) == [0.0] * len(answers)
    assert reward([f"{answer} or 0.125" for answer in answers], prompts) == [0.0] * len(answers)
