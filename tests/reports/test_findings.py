"""What was measured becomes findings at the thresholds that the docs name."""

import math
import re
from pathlib import Path

import pytest
import torch

from hybrid_lightning.reports import findings
from hybrid_lightning.reports.findings import (
    SECTIONS,
    Finding,
    PolicyChange,
    TrainingMonitor,
    cause,
    of_agreement,
    of_change,
    of_gradient,
    of_rollout,
)
from hybrid_lightning.shared.explain import sections
from hybrid_lightning.types import Completion, Episode, Prompt, Rewards, Rollout, Sequences

LIMITS = {"model.sampler.max_new_tokens": 6}
SEEN = (("accident", "warning"), ("large", "warning"), ("reference", "note"))


def test_every_finding_has_its_section_in_the_docs():
    assert set(SECTIONS.values()) <= set(sections())
    named = re.findall(r'(?:Finding|worse)\(\s*"(\w+)"', Path(findings.__file__).read_text(encoding="utf-8"))
    assert set(named) <= SECTIONS.keys() and len(set(named)) > 5


def rollout(rewards, finished=None, counted=None, episodes=()):
    """Groups of four completions with these rewards. A completion with a reward of at least 1 is right."""
    count = len(rewards)
    finished = [True] * count if finished is None else finished
    ends = episodes or [None] * count
    texts = tuple(Completion("", 1, done, episode=end) for done, end in zip(finished, ends, strict=True))
    one, real = torch.zeros(count, 1, dtype=torch.long), torch.ones(count, 1, dtype=torch.bool)
    prompts = tuple(Prompt(text="?") for _ in range(count // 4))
    total = torch.tensor(rewards).view(-1, 4)
    rewards = Rewards(total, {"part": total}, total >= 1, counted=None if counted is None else counted.view(-1, 4))
    return Rollout(prompts, texts, Sequences(one, real, one, real), torch.zeros(count, 1), rewards=rewards)


def said(*given, **named):
    return [(found.kind, found.level) for found in of_rollout(rollout(*given, **named), "the rollout", LIMITS)]


def test_rewards_that_do_not_differ_and_completions_that_are_cut_before_they_are_right():
    assert said([0.0] * 8) == [("equal", "error")] and said([0.0] * 4 + [1.0] * 4) == [("equal", "error")]
    assert said([0.0, 1, 1, 0] + [0.0] * 4) == []
    assert said([0.0] * 36 + [0, 1, 1, 0.0]) == [("equal", "warning")], "nine of ten groups"
    cut = [False] * 4 + [True] * 4
    assert said([0.0, 0, 0, 0, 0, 1, 1, 0], cut) == [("cut", "warning")]
    assert said([1.0, 0, 0, 0, 0, 1, 1, 0], cut) == [], "one that is right may be cut"
    kept = torch.tensor([True] * 4 + [False] * 4)
    assert said([0.0, 1, 1, 0, 5, 6, 7, 8], counted=kept) == [] == said([math.nan] * 4, counted=torch.zeros(4, dtype=torch.bool))
    over, long = (Episode((), 1, end, ()) for end in ("turns", "tokens"))
    assert said([0.0, 0, 0, 1], [False] * 4, episodes=[over] * 4) == [], "other ends of an episode are no cut"
    cut = of_rollout(rollout([0.0, 0, 0, 1], [False] * 4, episodes=[long] * 4), "it", LIMITS | {"model.episodes.max_tokens": 9})
    assert cut[0].remedy.startswith("raise model.sampler.max_new_tokens or model.episodes.max_tokens, or")


def test_the_cause_is_what_explains_the_rest():
    equal = {value: of_rollout(rollout([value] * 8), "the rollout", LIMITS)[0] for value in (0.0, 1.0)}
    assert "easier problems" in equal[0.0].remedy and "easier" not in equal[1.0].remedy and "harder" in equal[1.0].remedy
    paid, large, note = (Finding(kind, "seen", "mend it", level) for kind, level in SEEN)
    assert cause([equal[1.0], paid]) is paid and cause([paid, equal[0.0], large]) is large
    assert cause([note, large]) is large and cause([note]) is None


def test_episodes_that_earn_the_same_in_other_turns_differ_with_credit_by_turn():
    whole, later = rollout([1.0] * 8), torch.tensor([True] * 6 + [False] * 2)
    for to_go, level in (([0.0, 1, 0, 0, 1, 0, 0, 0], []), ([1.0] * 6 + [0.0] * 2, ["error"])):
        first = torch.ones(8, dtype=torch.bool)
        columns = (torch.tensor([[1.0] * 8, to_go]), torch.stack([first, first]), torch.stack([first, later]))
        total, correct, counted = (column.view(2, 2, 4).movedim(0, 2) for column in columns)
        credited = Rewards(total, {}, correct, counted=counted)
        assert [found.level for found in of_rollout(whole, "the rollout", LIMITS, credited)] == level


def test_the_change_of_a_step_by_hand():
    before, after = torch.tensor([[-1.0, -2.0, 9.0]]), torch.tensor([[-1.5, -1.0, -9.0]])
    mask = torch.tensor([[True, True, False]])
    change = PolicyChange.between(before, after, mask, {"ratio/max": torch.tensor(2.7)})
    by_hand = [math.exp(new - old) - (new - old) - 1 for old, new in ((-1.0, -1.5), (-2.0, -1.0))]
    assert change.kl == pytest.approx(sum(by_hand) / 2) and change.moved == pytest.approx(0.75) and change.clipped is None


# KL, share that moved, steps to come, and what is found.
RATES = [
    *((0.32, 0.45, 100, []), (0.43, 0.65, 100, [("large", "warning")]), (math.nan, math.nan, 100, [("large", "warning")])),
    *((1e-9, 2e-4, 100, [("small", "warning")]), (1e-9, 2e-4, 1000, []), (0.0, 0.0, 100, [("small", "error")])),
]


def test_rates_that_are_far_too_high_or_low_disagreement_and_gradients():
    for kl, moved, steps, kinds in RATES:
        assert [(found.kind, found.level) for found in of_change(PolicyChange(kl, moved, 1.0, None), steps, "32-true")] == kinds
    hidden = of_change(PolicyChange(0.0, 0.0, 1.0, None), 100, "bf16-mixed")
    assert [found.level for found in hidden] == ["warning"], "a step that rounding hides may add up"
    assert not of_agreement(1e-3, "32-true") and of_agreement(1.1e-3, "32-true")
    for precision in ("bf16-mixed", "16-mixed", "bf16-true"):
        assert not of_agreement(0.02, precision) and of_agreement(0.11, precision), "whatever the weights are"
    assert not of_gradient({"full": 0.0, "lora": 1e-9}, equal=False) and not of_gradient({"full": 0.0}, equal=True)
    assert [found.level for found in of_gradient({"full": 0.0, "lora": 0.0}, equal=False)] == ["error"]


def logged(reward, equal=0.0, solved=0.0):
    return {"reward": reward, "frac_reward_zero_std": equal, "solve_rate/all": solved}


def watched(rewards, equal=0.0, groups=32, spread=0.3, worst=0.0, solved=0.0):
    """Kinds of what is found at each rollout."""
    monitor = TrainingMonitor(groups)
    return [[found.kind for found in monitor.add_rollout(logged(reward, equal, solved), worst, spread)] for reward in rewards]


def test_a_run_that_loses_what_it_could_do_is_noticed_and_one_that_wavers_is_not():
    assert watched([0.4, 0.4, 0.4, 0.1, 0.05, 0.0])[-1] == ["worse"]
    assert not any(watched([0.4, 0.35, 0.42, 0.3, 0.25, 0.3, 0.25, 0.5, 0.4])), "more than half is left"
    assert not any(watched([0.4, 0.4, 0.4, 0.1, 0.05, 0.0], groups=8, spread=0.6)), "within four standard errors"
    assert watched([-1.0, -1.0, -1.0, -1.9, -1.9, -1.9], worst=-2.0)[-1] == ["worse"], "measured from the least reward"
    assert watched([0.0] * 3, equal=1.0) == [[], [], ["gradient"]]
    assert not any(watched([1.0] * 4, equal=1.0, solved=1.0)), "all is solved"
    assert watched([0.0] * 6, equal=1.0, groups=4) == [[], [], [], [], [], ["gradient"]], "24 groups at least"
    assert TrainingMonitor(8).add_rollout({"num_tokens": 3.0}, 0.0, 0.0) == [], "no completion counts"


def test_a_fall_to_rewards_that_are_all_equal_is_a_fall_and_not_a_lack_of_gradient():
    def kinds(rewards, equal):
        monitor = TrainingMonitor(32)
        rows = zip(rewards, equal, strict=True)
        return [[one.kind for one in monitor.add_rollout(logged(paid, same), 0.0, 0.3 * (same < 1))] for paid, same in rows]

    # As logged with rates 100 times too high, seeds 0 to 2: products of two digits with GRPO and GSPO, and with three.
    for first in (0.75, 0.848, 0.332):
        assert kinds([first, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.3, 1, 1, 1, 1, 1, 1])[3:] == [["worse"]] * 4
    assert kinds([0.004, 0.0, 0.0, 0.0, 0.004, 0.0, 0.0], [0.97, 1, 1, 1, 0.97, 1, 1])[3] == ["gradient"], (
        "it had nothing to lose"
    )


def test_a_ratio_or_an_entropy_that_collapses_is_noticed():
    def steps(rewards, *entropies, ratio=1.0):
        monitor = TrainingMonitor(32)
        for reward in rewards:
            monitor.add_rollout(logged(reward), 0.0, 0.3)
        metrics = [{"entropy": entropy, "ratio/mean": ratio, "grad_norm/lora": 1.0} for entropy in entropies]
        return [[found.kind for found in monitor.add_step(step)] for step in metrics]

    assert steps([0.3, 0.3], 0.4, 0.3, 0.001) == [[], [], ["worse"]]
    assert steps([0.3, 0.3, 0.3, 0.9], 0.4, 0.001) == [[], []], "a policy that has learned is sure of itself"
    assert steps([], 0.4, 0.001) == [[], []], "resumed in the middle of a rollout, or no episode counts"
    assert steps([0.3], 0.4, ratio=0.04) == [["worse"]] and steps([0.3], 0.4, ratio=1.9) == [[]]
