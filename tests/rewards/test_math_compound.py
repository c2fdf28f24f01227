"""Answers in several units, such as 1 hour and 30 minutes, are one number."""

import pytest

from hybrid_lightning.rewards import MathMatch
from hybrid_lightning.types import Prompt

RIGHT = [
    ("90", "It takes her 1 hour and 30 minutes."),
    ("1.5", "It takes her 1 hour and 30 minutes."),
    ("90 minutes", r"\boxed{1 \text{ hour } 30 \text{ minutes}}"),
    (r"1.5 \text{ hours}", r"The answer is $\boxed{1\text{ hour and }30\text{ minutes}}$."),
    ("1 hour and 30 minutes", "She needs 90 minutes."),
    ("1 hour 30 minutes", "1.5 hours"),
    ("2.50", "Each costs 2 dollars and 50 cents."),
    ("66", "He is 5 feet 6 inches tall."),
    ("5.5 feet", "5 ft. 6 in."),
    ("5420", "1 hour, 30 minutes and 20 seconds"),
    ("17 days", "2 weeks and 3 days"),
    ("7.25 kg", "7 kg 250 g"),
    ("30", "2 miles and 30"),
]
WRONG = [
    ("30", "It takes her 1 hour and 30 minutes."),
    ("1", "It takes her 1 hour and 30 minutes."),
    ("1.5 minutes", "1 hour and 30 minutes"),
    ("90 hours", "1 hour and 30 minutes"),
    ("1 hour and 30 minutes", "30 minutes"),
    ("150", "It is 1 hour, 90 minutes."),  # two answers
    ("203", "2 miles and 3 hours"),
]


@pytest.fixture(scope="module")
def reward():
    return MathMatch()


def verdicts(reward, pairs):
    prompts = [Prompt(answer=gold, text="?") for gold, _ in pairs]
    return [score == 1.0 for score in reward([text for _, text in pairs], prompts)]


def test_answers_in_several_units_are_one_number(reward):
    pairs = RIGHT + WRONG
    found = dict(zip(pairs, verdicts(reward, pairs), strict=True))
    assert [pair for pair in RIGHT if not found[pair]] == [] and [pair for pair in WRONG if found[pair]] == []


def test_votes_agree_on_what_is_said_in_several_units(reward):
    texts = ["1 hour and 30 minutes", "90 minutes", r"\boxed{1\text{ h }30\text{ min}}"]
    assert {reward.extract_answer(text, Prompt(answer="90", text="?")) for text in texts} == {"90.000000"}
