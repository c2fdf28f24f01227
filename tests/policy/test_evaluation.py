import json

import pytest
import torch

from hybrid_lightning.policy.evaluation import EvaluationMetrics, prediction_records, repeat_prompts
from hybrid_lightning.rollout.padding import pad_left, pad_right
from hybrid_lightning.types import Prompt, Rewards, Rollouts, Sequences


def build(indices, correct, lengths):
    """Rollouts of prompts with these indices; `correct` and `lengths` hold one list a prompt."""
    samples = len(correct[0])
    prompts = tuple(Prompt(text=f"q{i}", answer=f"a{i}", index=i) for i in indices)
    flat = [value for row in correct for value in row]
    completions = [[6] * length for row in lengths for length in row]
    sequences = Sequences(*pad_left([[5]] * len(flat), 0, "cpu"), *pad_right(completions, 0, "cpu"))
    shape = sequences.completion_ids.shape
    texts = tuple(f"c{number}" for number in range(len(flat)))
    rollouts = Rollouts(prompts, sequences, texts, torch.zeros(shape), torch.ones(len(flat), dtype=torch.bool), samples)
    values = torch.tensor([float(value) for value in flat])
    return rollouts, Rewards(values / 2, {"match": values, "half": values / 2}, torch.tensor(flat))


BATCHES = [
    (([0, 1], [[1], [0]], [[3], [3]]), ([0, 1], [[1, 1, 0, 0], [0, 0, 0, 0]], [[1, 2, 3, 4], [2, 2, 2, 2]])),
    (([2], [[1]], [[3]]), ([2], [[1, 1, 1, 1]], [[4, 4, 4, 4]])),
]
EXPECTED = {
    "greedy_accuracy": 2 / 3,
    "greedy_reward": 1 / 3,
    "avg@4": 0.5,
    "pass@2": (5 / 6 + 0 + 1) / 3,
    "pass@4": 2 / 3,
    "reward": 0.25,
    "completion_length": (2.5 + 2 + 4) / 3,
}


def evaluate(batches):
    metrics = EvaluationMetrics(4)
    for greedy, sampled in batches:
        metrics.update(*(build(i, [[bool(c) for c in row] for row in correct], n) for i, correct, n in (greedy, sampled)))
    return metrics


def test_metrics_are_over_all_prompts_and_not_over_batches():
    values = {name: float(value) for name, value in evaluate(BATCHES).compute().items()}
    assert values == pytest.approx(EXPECTED)


def test_a_prompt_seen_twice_counts_once():
    values = {name: float(value) for name, value in evaluate([*BATCHES, BATCHES[1]]).compute().items()}
    assert values == pytest.approx(EXPECTED)


def test_nothing_seen_gives_nothing_also_after_a_reset():
    metrics = evaluate(BATCHES)
    metrics.reset()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert metrics.compute() == {}


def test_the_metrics_are_no_part_of_a_checkpoint():
    assert evaluate(BATCHES).state_dict() == {}


def test_records_hold_each_prompts_own_completions_and_survive_json():
    rollouts, rewards = build([4, 9], [[True, False], [False, True]], [[1, 1], [1, 1]])
    records = [json.loads(json.dumps(record)) for record in prediction_records(rollouts, rewards, ["shown 4", "shown 9"])]
    assert records[1] == {
        "index": 9,
        "prompt": "shown 9",
        "answer": "a9",
        "completions": ["c2", "c3"],
        "rewards": [0.0, 0.5],
        "reward_parts": {"match": [0.0, 1.0], "half": [0.0, 0.5]},
        "correct": [False, True],
    }
    assert records[0]["completions"] == ["c0", "c1"]


def test_prompts_are_repeated_in_prompt_major_order():
    prompts = (Prompt(text="a"), Prompt(text="b"))
    assert [prompt.text for prompt in repeat_prompts(prompts, 2)] == ["a", "a", "b", "b"]
