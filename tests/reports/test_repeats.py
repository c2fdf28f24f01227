"""Completions that are scored twice: what differs is named, with how far."""

import json
import random
import re

import numpy as np
import pytest
import torch
from fake_judge import FakeJudge, graded
from tiny_runs import DigitShare, Talk, build_policy

from hybrid_lightning.reports.repeats import scored_again
from hybrid_lightning.rewards import ExactMatch, FunctionReward, JudgeReward, RewardBySet, RewardFunction, WeightedSum, judge
from hybrid_lightning.rewards.evaluate import evaluate_reward
from hybrid_lightning.types import Completion, Prompt, Rollout, Sequences

PROMPTS = [Prompt(text=f"{n}+1=", answer=str(n + 1), index=n, set_name="sums") for n in range(24)]
TEXTS = tuple(Completion(f"{n // 4} and {n}", 3, True) for n in range(96))


def of_python(completion):
    return float(random.random() < 0.5)


def of_numpy(completion):
    return float(np.random.random() < 0.5)


def of_torch(completions):
    return (torch.rand(len(completions)) < 0.5).float()


class Ranks(RewardFunction):
    """Depends on all completions together, and has rounding errors of its own."""

    def __call__(self, completions, prompts):
        order = sorted(completions)
        return [order.index(text) / len(order) + 1e-8 * random.random() for text in completions]


class Counts(RewardFunction):
    """Keeps a count between calls."""

    calls = 0

    def __call__(self, completions, prompts):
        self.calls += 1
        return [float(self.calls > 1)] * len(completions)


def compared(model, reward, **policy):
    """The note, and name of the reward, level and text of each finding, for a rollout that the reward has scored once."""
    generation = build_policy(model, reward=reward, **policy).task.generation
    one, real = torch.zeros(96, 1, dtype=torch.long), torch.ones(96, 1, dtype=torch.bool)
    sequences = Sequences(one, real, one, real)
    rewards = evaluate_reward(generation.reward, TEXTS, [prompt for prompt in PROMPTS for _ in range(4)])
    rewards = rewards.apply(lambda values: values.view(len(PROMPTS), 4))
    state = random.getstate()
    note, found = scored_again(generation, Rollout(tuple(PROMPTS), TEXTS, sequences, torch.zeros(96, 1), rewards=rewards))
    assert random.getstate() == state
    assert [finding.kind for finding in found] == ["repeat"] * len(found)
    return note, [(finding.level, finding.text) for finding in found]


@pytest.mark.parametrize("coin", [of_python, of_numpy, of_torch])
def test_a_coin_is_named_with_how_far_it_differs(model, coin):
    note, ((level, text),) = compared(model, FunctionReward(coin))
    differing = r"different for (\d+) of 96 completions that are scored twice, by ([\d.]+) on average, up to 1"
    share, mean = re.fullmatch(differing, note).groups()
    assert level == "warning" and text == f"the reward {coin.__name__} is {note}"
    assert 20 < int(share) < 76 and float(mean) == pytest.approx(int(share) / 96, abs=0.01)


def test_only_the_part_that_differs_is_named(model):
    note, ((_, text),) = compared(model, WeightedSum([DigitShare(), FunctionReward(of_python)], [1.0, 0.1]))
    assert note.startswith("digit_share the same for 96") and "; of_python different for" in note
    assert text.startswith("the reward of_python is different")
    assert compared(model, Counts())[1][0][1].startswith("the reward counts is different for 96 of 96")


@pytest.mark.parametrize("reward", [DigitShare(), ExactMatch(r"(\d+)"), Ranks()])
def test_rewards_that_are_repeatable_but_for_rounding_are_not_named(model, reward):
    assert compared(model, reward) == ("the same for 96 completions that are scored twice", [])


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(judge, "_FIRST_PAUSE_S", 0.001)
    server = FakeJudge()
    yield server
    server.close()


def test_a_judge_grades_some_again_although_its_replies_are_kept(model, fake, tmp_path):
    given = {"rubric": "Grade it.", "base_url": fake.url, "model": "j", "cache_dir": str(tmp_path), "retries": 0}
    assert compared(model, JudgeReward(**given))[0] == "the same for 64 completions that are scored twice"
    assert len(fake.requests) == 96 + 64
    grades = iter([*[5] * 96, *[5, 6] * 32])
    fake.grade = lambda text: graded(next(grades))
    by_set = RewardBySet({"sums": JudgeReward(**{**given, "rubric": "Again."})})
    note, ((level, _),) = compared(model, by_set)
    assert note == "different for 32 of 64 completions that are scored twice, by 0.05 on average, up to 0.1"
    assert level == "warning", "there is nothing else to learn from"
    known = by_set.rewards["sums"].explain(TEXTS[0], PROMPTS[0])
    assert json.loads(known)["score"] == 5, "the first reply stays the one that trains"
    noisy = iter([*[0, 10] * 48, *[1, 10] * 32])
    fake.grade = lambda text: graded(next(noisy))
    ordered = JudgeReward(**{**given, "rubric": "More.", "concurrency": 1})
    assert [level for level, _ in compared(model, ordered)[1]] == ["note"], "little beside what there is to learn"
    fake.grade = lambda text: graded(3)
    failing = JudgeReward(**{**given, "rubric": "Last."})
    original = failing.anew
    failing.anew = lambda: (setattr(fake, "grade", lambda text: (500, "boom")), original())[1]
    note, found = compared(model, failing)
    assert note.startswith("could not be scored again: the judge at") and found == []


def test_an_environments_own_rewards_are_not_scored_again(model):
    generation = build_policy(model, reward=None, environment=Talk(), turn_template="{content}").task.generation
    assert scored_again(generation, None)[0].startswith("not applicable")
