import json
import time
from pathlib import Path

import pytest

from hybrid_lightning.errors import DataError, RewardError
from hybrid_lightning.rewards import MultipleChoice
from hybrid_lightning.rewards.multiple_choice import CHOICES, extract_choice, reference_choice
from hybrid_lightning.types import Prompt

# A line for each letter, and one for none: completions in which it is the answer.
CASES = [json.loads(line) for line in Path(__file__).with_name("choice_cases.jsonl").read_text(encoding="utf-8").splitlines()]


def test_choices_are_found_and_nothing_else_is_taken_for_one():
    expected = {text: case["letter"] for case in CASES for text in case["texts"]}
    assert {text: extract_choice(text, CHOICES) for text in expected} == expected and len(expected) > 50


def test_only_letters_of_options_outside_of_the_reasoning_and_in_the_pattern_are_choices():
    four, ten = (Prompt(text="?", answer="A", columns={"options": list(range(count))}) for count in (4, 10))
    assert MultipleChoice().extract_answer("The answer is E", four) is None
    assert MultipleChoice().extract_answer("The answer is E", ten) == "E"
    assert extract_choice("The answer is N", "ABCDEFGHIJKLMN") == "N"
    prompt = Prompt(text="?", answer="D")
    texts = ["<think>The answer is A.</think>The answer is D.", "<think>The answer is D.", r"<think>\boxed{A}</think> \boxed{D}"]
    assert MultipleChoice()(texts, [prompt] * 3) == [1.0, 0.0, 1.0]
    reward = MultipleChoice(pattern=r"<answer>(.*?)</answer>")
    assert reward(["<answer>(B)</answer> not A", "B"], [Prompt(text="?", answer="B")] * 2) == [1.0, 0.0]


def test_reference_answers():
    assert [reference_choice(answer) for answer in ("C", " (C) ", r"$\text{(C)}$", "c", "12", "CD")] == ["C"] * 3 + [None] * 3


def test_a_row_without_a_letter_is_named():
    for prompt, message in (
        (Prompt(text="?", answer="12", source="q.csv", index=3), r"'12' of q\.csv row 3 is not a letter from A to J"),
        (Prompt(text="?", answer="E", columns={"options": list("wxyz")}), "'E' .* is not a letter from A to D"),
        (Prompt(text="?", answer="A", columns={"options": "wxyz"}), "column 'options' .* is not a list of 2 to 26 options"),
        (Prompt(text="?", source="q.csv", index=3), r"q\.csv row 3 has none"),
    ):
        with pytest.raises((DataError, RewardError), match=message):
            MultipleChoice().check_prompt(prompt)


def test_long_texts_are_read_at_once():
    parts = {"* ": 20_000, "$ ": 20_000, "\\text{": 5_000, "A, ": 5_000, "answer is ": 5_000}
    texts = [*(part * count for part, count in parts.items()), r"\boxed{ " + "\\text{ " * 3_000]
    start = time.process_time()
    assert {extract_choice(text, CHOICES) for text in texts} == {None}
    assert time.process_time() - start < 10  # a minute and a half each, if patterns could match in many ways
