import statistics

import pytest
import torch

from hybrid_lightning.policy.sampled_groups import rollout_metrics
from hybrid_lightning.rollout.batching import pad_left, pad_right
from hybrid_lightning.types import Prompt, Rewards, Rollouts, Sequences

PROMPT_LENGTHS, LENGTHS = [3, 2, 1], [1, 4, 2, 2, 3, 3, 1, 1, 4]
TOTAL = [1.0, 0.0, 0.5, 0.25, 0.25, 0.25, 1.0, 1.5, 1.0]
FINISHED = [True, False, True, True, True, True, True, True, False]


def build(samples=3, total=TOTAL, correct=None, parts=None, sets=("", "", "")):
    count = len(total)
    prompts = [Prompt(text=str(i), index=i, set_name=sets[i % 3]) for i in range(count // samples)]
    ids = [[5] * PROMPT_LENGTHS[row // samples % 3] for row in range(count)]
    completions = [[6] * LENGTHS[row] for row in range(count)]
    sequences = Sequences(*pad_left(ids, 0, "cpu"), *pad_right(completions, 0, "cpu"))
    logprobs = torch.zeros(sequences.completion_ids.shape)
    finished = torch.tensor(FINISHED[:count])
    values = torch.tensor(total)
    correct = values >= 1 if correct is None else torch.tensor(correct)
    rewards = Rewards(values, {"match": values} if parts is None else parts, correct)
    return Rollouts(tuple(prompts), sequences, ("",) * count, logprobs, finished, samples), rewards


def test_every_value_by_hand():
    correct = [True, False, False, False, False, False, True, True, True]
    parts = {"match": torch.tensor([float(c) for c in correct]), "format": torch.tensor(TOTAL)}
    metrics = rollout_metrics(*build(correct=correct, parts=parts))
    groups = [TOTAL[:3], TOTAL[3:6], TOTAL[6:]]
    expected = {
        "reward": statistics.mean(TOTAL),
        "reward_std": statistics.mean(statistics.stdev(group) for group in groups),
        "frac_reward_zero_std": 1 / 3,
        "accuracy": 4 / 9,
        "solve_rate/all": 1 / 3,
        "solve_rate/none": 1 / 3,
        "solve_rate/mixed": 1 / 3,
        "completions/mean_length": statistics.mean(LENGTHS),
        "completions/min_length": 1,
        "completions/max_length": 4,
        "completions/clipped_ratio": 2 / 9,
        "num_tokens": sum(LENGTHS) + 3 * sum(PROMPT_LENGTHS),
        "rewards/match/mean": 4 / 9,
        "rewards/match/std": statistics.stdev(map(float, correct)),
        "rewards/format/mean": statistics.mean(TOTAL),
        "rewards/format/std": statistics.stdev(TOTAL),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-6), name
        assert type(metrics[name]) is float


def test_rewards_equal_up_to_rounding_and_single_ones_have_no_spread():
    metrics = rollout_metrics(*build(total=[0.1] * 9))
    assert metrics["frac_reward_zero_std"] == 1 and metrics["reward_std"] == pytest.approx(0, abs=1e-7)
    metrics = rollout_metrics(*build(samples=1, total=[0.5]))
    assert metrics["reward_std"] == metrics["rewards/match/std"] == 0 and metrics["frac_reward_zero_std"] == 1


def test_sets_of_a_mixture_are_told_apart():
    metrics = rollout_metrics(*build(sets=("sums", "quiz", "sums")))
    of_sets = {name: value for name, value in metrics.items() if name.startswith("sets/")}
    sums, lengths = TOTAL[:3] + TOTAL[6:], LENGTHS[:3] + LENGTHS[6:]
    assert of_sets == pytest.approx(
        {
            "sets/sums/reward": statistics.mean(sums),
            "sets/sums/accuracy": 4 / 6,
            "sets/sums/mean_length": statistics.mean(lengths),
            "sets/quiz/reward": statistics.mean(TOTAL[3:6]),
            "sets/quiz/accuracy": 0.0,
            "sets/quiz/mean_length": statistics.mean(LENGTHS[3:6]),
        }
    )
    assert not any(name.startswith("sets/") for name in rollout_metrics(*build()))


def test_sets_of_other_ranks_count_too(monkeypatch):
    """This rank has no quiz, the other nothing else; each has nine sequences."""
    module = "hybrid_lightning.policy.sampled_groups"
    gathered = lambda columns: {name: torch.cat([column, column.flip(0)]) for name, column in columns.items()}  # noqa: E731
    monkeypatch.setattr(f"{module}.gather_columns", gathered)
    monkeypatch.setattr(f"{module}.gather_objects", lambda names: [names, ["quiz", "quiz", "riddles"]])
    metrics = rollout_metrics(*build(sets=("sums", "riddles", "riddles")))
    assert metrics["sets/sums/reward"] == pytest.approx(statistics.mean(TOTAL[:3]))
    assert metrics["sets/quiz/reward"] == pytest.approx(statistics.mean(TOTAL[3:]))
    assert metrics["sets/riddles/reward"] == pytest.approx(statistics.mean(TOTAL[3:] + TOTAL[:3]))
