"""Completions that are scored as they arrive: the same numbers, the same errors, and nothing left running at the end."""

import threading
import time

import pytest

from hybrid_lightning.errors import RewardError
from hybrid_lightning.rewards import (
    ArrivingRewards,
    CodeTests,
    ExactMatch,
    FinalAnswer,
    FunctionReward,
    RewardBySet,
    RewardFunction,
    WeightedSum,
    evaluate_reward,
)
from hybrid_lightning.types import Completion, Episode, Prompt

PROMPTS = [Prompt(text="?", answer=str(number), index=number, set_name="ab"[number % 2]) for number in range(6)]
TEXTS = [str(number % 3) for number in range(6)]


class Slow(RewardFunction):
    """Counts calls, and the most that were under way at the same time."""

    def __init__(self, concurrency=4):
        self.concurrency, self.calls, self.running, self.most = concurrency, [], 0, 0
        self.lock, self.goes_on = threading.Lock(), threading.Event()

    def overlaps(self, prompt):
        return max(1, self.concurrency // 2)

    def __call__(self, completions, prompts):
        with self.lock:
            self.calls.append((threading.current_thread().name, len(completions)))
            self.running += 1
            self.most = max(self.most, self.running)
        assert self.goes_on.wait(20)
        with self.lock:
            self.running -= 1
        return [float(text == prompt.answer) for text, prompt in zip(completions, prompts, strict=True)]


def judged(completion, answer):
    return float(completion == answer)


def judged_together(completions, answer):
    return [float(text == right) / len(completions) for text, right in zip(completions, answer, strict=True)]


async def awaited(completion, answer):
    return judged(completion, answer)


async def awaited_together(completions, answer):
    return [judged(*pair) for pair in zip(completions, answer, strict=True)]


def careless(completion):
    return 1 / int(completion)


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)


def same(one, other):
    return one.total.tolist() == other.total.tolist() and one.correct.tolist() == other.correct.tolist()


def test_each_completion_is_scored_when_it_arrives_and_the_others_in_the_end():
    reward = Slow()
    arriving = ArrivingRewards(reward, PROMPTS)
    for row in (3, 1, 4):
        arriving.add(row, TEXTS[row])
        arriving.add(row, TEXTS[row])  # announced twice, it is scored once
    wait_for(lambda: reward.running == 2)
    assert reward.calls == [("rewards", 1)] * 2, "two at a time, the number that it allows meanwhile, each alone"
    threading.Thread(target=lambda: [wait_for(lambda: reward.running == 4), reward.goes_on.set()]).start()
    found = evaluate_reward(reward, TEXTS, PROMPTS, arriving=arriving)
    assert same(found, evaluate_reward(reward, TEXTS, PROMPTS)) and found.total.tolist() == [1, 1, 1, 0, 0, 0]
    assert reward.most == 4 and reward.calls == [("rewards", 1)] * 6 + [("MainThread", 6)]


@pytest.mark.parametrize(
    ("reward", "overlap"),
    [
        (FunctionReward(judged), [False, False]),
        (FunctionReward(judged, overlap=True), [True, True]),
        (FunctionReward(awaited), [True, True]),
        (FunctionReward(awaited, overlap=False), [False, False]),
        (FunctionReward(awaited_together), [False, False]),
        (FunctionReward(judged_together, overlap=True), [True, True]),
        (RewardBySet({"a": FunctionReward(awaited), "b": ExactMatch()}), [True, False]),
    ],
)
def test_which_rewards_are_scored_so_and_that_their_numbers_are_the_same(reward, overlap):
    assert [reward.overlaps(prompt) > 0 for prompt in PROMPTS[:2]] == overlap
    whole = WeightedSum([reward, FunctionReward(judged, name="plain")], [2.0, -0.5])
    arriving = ArrivingRewards(whole, PROMPTS)
    assert (arriving.on_completion is None) == (not any(overlap))
    for row in (5, 0):
        arriving.add(row, TEXTS[row])
    counted = [True, True, False, True, True, True]
    found = evaluate_reward(whole, TEXTS, PROMPTS, counted, arriving)
    assert found.total.tolist() == [1.5, 1.5, 0, 0, 0, 0] and found.counted.tolist() == counted
    if reward.name != "judged_together":
        assert same(found, evaluate_reward(whole, TEXTS, PROMPTS, counted))


def test_programs_and_last_messages():
    row = Prompt(text="Double x.", columns={"test": "assert double(2) == 4"})
    programs = ["def double(x): return 2 * x", "def double(x): return x", "def double(x): return x + x"]
    episodes = [
        Completion("", 3, True, False, Episode(({"role": "assistant", "content": text},), 1, "answered", (), {}, (3,)))
        for text in programs
    ]
    reward = FinalAnswer(CodeTests(workers=2))
    assert reward.concurrency == 2 and reward.overlaps(row) == 1
    arriving = ArrivingRewards(reward, [row] * 3)
    arriving.add(2, episodes[2])
    assert evaluate_reward(reward, episodes, [row] * 3, arriving=arriving).total.tolist() == [1, 0, 1]


def test_the_first_rows_error_is_raised_and_ends_the_rest():
    reward = FunctionReward(careless, overlap=True, concurrency=1)
    arriving = ArrivingRewards(reward, PROMPTS)
    arriving.add(3, "0")
    with pytest.raises(RewardError, match=r"careless raised ZeroDivisionError.*row 0.*completion '0'"):
        evaluate_reward(reward, TEXTS, PROMPTS, arriving=arriving)


def test_what_nobody_needs_any_more_is_not_begun():
    reward = Slow(concurrency=1)
    arriving = ArrivingRewards(reward, PROMPTS)
    for row, text in enumerate(TEXTS):
        arriving.add(row, text)
    arriving.cancel()
    reward.goes_on.set()
    wait_for(lambda: all(thread.name != "rewards" for thread in threading.enumerate()))
    assert len(reward.calls) <= 1, "the first may have begun"
