import time

import pytest

from hybrid_lightning.errors import DataError, RewardError
from hybrid_lightning.rewards import MultipleChoice, evaluate_reward
from hybrid_lightning.rewards.multiple_choice import CHOICES, extract_choice, reference_choice
from hybrid_lightning.types import Prompt

FOUND = {
    "A": ["A", "The answer is A.", "The answer is A because it fits", "Option A is correct", "(A) is correct", "I pick A", "a"],
    "B": [
        r"\boxed{\textbf{(B)}\ 27}",
        "B is wrong? No: B",
        "Vitamin C is needed, so B",
        "(A)? Wait, the answer is (B).",
    ],
    "C": [
        "The answer is (C).",
        "the answer is (c)",
        "answer: c",
        r"$\boxed{\text{C}}$",
        r"\boxed{C} and again \boxed{C}",
        "C) 5 m/s",
        "**Answer:** C",
        "**Answer: C**",
        "The correct option is C.",
        "The best choice would be C",
        "The answer is C, B is wrong.",
        "The answer is \u201cC\u201d",
        "A and B are wrong, thus (C)",
        "<answer>C</answer>",
    ],
    "I": ["I", "(I)", "The answer is I.", "The answer is (I).", "The answer is I because it is"],
    "J": ["Answer: (J)", "I choose J.", r"\[\boxed{\mathrm{J}}\]"],
}
NOT_FOUND = [
    "",
    r"\boxed{42} so C",
    "The answer is a prime number",
    "The answer: A triangle has three sides",
    "A triangle has three sides",
    "I think so",
    "I'm not sure.",
    "I\u2019m not sure.",
    "A or B",
    "The answer is (A) or (B).",
    "The answer is (A), (B), and (C)",
    "The answer is A/B",
    r"\boxed{A} or \boxed{B}",
    r"\boxed{A, B}",
    r"\boxed{A \text{ or } B}",
    "The answer is not C.",
    "the answer is a cat",
    "the answer is c minus b",
    "It is not C",
    "None of the above",
    "The answer is Boron",
    "The answer is B-cells",
    "The answer is K.",
    "CAB",
    "C is the current.\nI do not know.",
]


@pytest.mark.parametrize(("text", "letter"), [(text, letter) for letter, texts in FOUND.items() for text in texts])
def test_a_choice(text, letter):
    assert extract_choice(text, CHOICES) == letter


@pytest.mark.parametrize("text", NOT_FOUND)
def test_no_choice(text):
    assert extract_choice(text, CHOICES) is None


def test_only_letters_of_options_are_choices():
    four, ten = (Prompt(text="?", answer="A", columns={"options": list(range(count))}) for count in (4, 10))
    assert MultipleChoice().extract_answer("The answer is E", four) is None
    assert MultipleChoice().extract_answer("The answer is E", ten) == "E"
    assert extract_choice("The answer is N", "ABCDEFGHIJKLMN") == "N"


def test_reasoning_is_not_looked_at():
    prompt = Prompt(text="?", answer="D")
    texts = ["<think>The answer is A.</think>The answer is D.", "<think>The answer is D.", r"<think>\boxed{A}</think> \boxed{D}"]
    assert MultipleChoice()(texts, [prompt] * 3) == [1.0, 0.0, 1.0]


def test_a_pattern_limits_what_is_looked_at():
    reward = MultipleChoice(pattern=r"<answer>(.*?)</answer>")
    assert reward(["<answer>(B)</answer> not A", "B"], [Prompt(text="?", answer="B")] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "letter"), [("C", "C"), (" (C) ", "C"), (r"$\text{(C)}$", "C"), ("c", None), ("12", None), ("CD", None)]
)
def test_reference_answers(answer, letter):
    assert reference_choice(answer) == letter


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(text="?", answer="12", source="q.csv", index=3), r"'12' of q\.csv row 3 is no letter from A to J"),
        (Prompt(text="?", answer="E", columns={"options": list("wxyz")}), "'E' .* is no letter from A to D"),
        (Prompt(text="?", answer="A", columns={"options": "wxyz"}), "column 'options' .* is no list of 2 to 26 options"),
    ],
)
def test_a_row_without_a_letter_is_named(prompt, message):
    with pytest.raises(DataError, match=message):
        MultipleChoice().check_prompt(prompt)


def test_a_row_without_an_answer_is_named():
    with pytest.raises(RewardError, match=r"q\.csv row 3 has none"):
        evaluate_reward(MultipleChoice(), ["A"], [Prompt(text="?", source="q.csv", index=3)])


def test_long_texts_are_read_at_once():
    texts = [
        "* " * 20_000,
        "$ " * 20_000,
        "\\text{" * 5_000,
        r"\boxed{ " + "\\text{ " * 3_000,
        "A, " * 5_000,
        "answer is " * 5_000,
    ]
    start = time.process_time()
    assert {extract_choice(text, CHOICES) for text in texts} == {None}
    assert time.process_time() - start < 10  # a minute and a half each, if patterns could match in many ways
