import itertools
from decimal import Decimal
from types import MappingProxyType

import numpy as np
import pytest
import torch

from hybrid_lightning.environments import CUT_MARK, Step, answers
from hybrid_lightning.environments.answers import OddAnswerError, checked_messages, checked_step

USER = {"role": "user", "content": "hi"}
MOST = 20_000  # characters of all messages


@pytest.fixture(autouse=True)
def short_messages(monkeypatch):
    monkeypatch.setattr(answers, "MAX_CHARS", MOST)


def test_messages_in_every_form_are_copies_with_all_that_they_hold():
    for value in ("hi", USER, [USER], ("hi",), [MappingProxyType(USER)], [{"role": np.str_("user"), "content": "hi"}]):
        (message,) = checked_messages(value)
        assert message == USER and type(message) is dict and type(message["role"]) is str
    given = {"role": "tool", "content": "3", "name": "add", "data": {"a": [1, None, True, 0.5]}}
    (message,) = checked_messages([given])
    assert message == given
    given["data"]["a"].append(2)
    assert message["data"] == {"a": [1, None, True, 0.5]}
    assert checked_messages(None) == checked_messages([]) == ()


def test_whatever_is_not_a_message_is_reported():
    for value, message in (
        (3, "returned 3; it must return messages"),
        (b"hi", "returned b'hi'"),
        ([3], "returned the message 3; a message has a role and a content"),
        ([{"role": "user"}], "a message has a role and a content"),
        ([{"role": "assistant", "content": "hi"}], "role 'assistant'; give a role such as user or tool"),
        ([{"role": "user", "content": b"hi"}], "the content b'hi'; it must be text"),
        (["\ud800"], r"that cannot be written as JSON .*'\\ud800' in .* decode bytes with errors=\"replace\""),
        (
            [{**USER, "x": {1}}],
            r"that cannot be written as JSON \(Object of type set .* use only texts, numbers, lists and dicts",
        ),
    ):
        with pytest.raises(OddAnswerError, match=message):
            checked_messages(value)


def test_floods_are_cut():
    (message,) = checked_messages("x" * (MOST + 5))
    assert message["content"].endswith(f"x{CUT_MARK}") and len(message["content"]) <= MOST + len(CUT_MARK)
    messages = checked_messages(["x" * (MOST // 2)] * 10)
    assert 2 <= len(messages) <= 3 and messages[-1]["content"].endswith(CUT_MARK)
    messages = checked_messages([""] * MOST)
    assert len(messages) == MOST / 1_000
    with pytest.raises(OddAnswerError, match="characters beside its content"):
        checked_messages([{**USER, "x": [[]] * 10 * MOST}])


ONES = [1, True, 1.0, np.float32(1), np.int64(1), np.bool_(True), torch.tensor(1), torch.ones(()), Decimal(1)]


def test_steps_in_every_form():
    for reward, over in itertools.product(ONES, [True, 1, np.bool_(True), torch.tensor(True)]):
        for value in (("hi", reward, over), Step("hi", reward, over)):
            step = checked_step(value)
            assert step == Step((USER,), 1.0, True) and type(step.reward) is float and type(step.over) is bool


def test_whatever_is_not_a_step_is_reported():
    for value, message in (
        (None, "returned None; it must return a Step, or a tuple of messages, reward and over"),
        (("hi", 1.0, True, {}), "it must return a Step"),
        (("hi", "1", True), "returned reward='1'; it must be a number"),
        (("hi", Decimal("nan"), True), "returned reward=Decimal"),
        (("hi", 1e39, True), r"returned reward=1e\+39; it must be finite"),
        (("hi", 10**400, True), "returned reward=1000"),
        (("hi", 1.0, 2), "returned over=2; it must be True or False"),
        ((3, 1.0, True), "returned 3; it must return messages"),
        (Step(end="won"), "returned end='won'"),
        (Step(counts=[1]), r"returned counts=\[1\]; it must be a dict of numbers"),
        (Step(counts={"calls": "2"}), r"returned counts\['calls'\]='2'; it must be a number"),
    ):
        with pytest.raises(OddAnswerError, match=message):
            checked_step(value)
