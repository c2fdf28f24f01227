import json
from dataclasses import replace

import pytest
import torch

from hybrid_lightning.policy.evaluation import add_prompts, evaluation_means, prediction_records
from hybrid_lightning.rollout.batching import pad_left, pad_right
from hybrid_lightning.types import Prompt, Rewards, Rollouts, Sequences

ANSWERS = {0: ["7", "7", "5", "6"], 1: ["5", None, "5", "6"], 2: ["9"] * 4}


def build(indices, correct, lengths, sets=""):
    """Rollouts of prompts with these indices; `correct` and `lengths` hold one list a prompt. What is 5 tokens long was cut."""
    samples = len(correct[0])
    prompts = tuple(Prompt(text=f"q{i}", answer=f"a{i}", index=i, set_name=sets) for i in indices)
    flat = [value for row in correct for value in row]
    completions = [[6] * length + [7] for row in lengths for length in row]  # behind which an environment added a token
    sequences = Sequences(*pad_left([[5]] * len(flat), 0, "cpu"), *pad_right(completions, 0, "cpu"))
    sequences = replace(sequences, sampled_mask=sequences.completion_ids == 6)
    shape = sequences.completion_ids.shape
    texts = tuple(f"c{number}" for number in range(len(flat)))
    finished = sequences.sampled_mask.sum(dim=1) < 5
    rollouts = Rollouts(prompts, sequences, texts, torch.zeros(shape), finished, samples)
    values = torch.tensor([float(value) for value in flat])
    return rollouts, Rewards(values / 2, {"match": values, "half": values / 2}, torch.tensor(flat))


BATCHES = [
    (([0, 1], [[1], [0]], [[3], [3]]), ([0, 1], [[1, 1, 0, 0], [0, 0, 0, 0]], [[1, 2, 3, 4], [2, 2, 2, 5]])),
    (([2], [[1]], [[3]]), ([2], [[1, 1, 1, 1]], [[4, 4, 4, 4]])),
]
EXPECTED = {
    "problems": 3,
    "greedy_accuracy": 2 / 3,
    "greedy_reward": 1 / 3,
    "avg@4": 0.5,
    "pass@1": 0.5,
    "pass@2": (5 / 6 + 0 + 1) / 3,
    "pass@4": 2 / 3,
    "maj@1": 0.5,
    "maj@2": (1 / 6 + 4 / 6 * 0.5 + 0 + 1) / 3,
    "maj@4": 2 / 3,
    "reward": 0.25,
    "completion_length": (2.5 + 2.75 + 4) / 3,
    "truncation_rate": 1 / 12,
}


def evaluate(batches, sets=""):
    metrics = evaluation_means(4)
    for parts in batches:
        greedy, sampled = (build(i, [[bool(c) for c in row] for row in correct], n, sets) for i, correct, n in parts)
        add_prompts(metrics, greedy[1], sampled, [answer for index in parts[1][0] for answer in ANSWERS[index]])
    return metrics


def values_of(metrics, name=""):
    return {key: float(value) for key, value in metrics.compute()[name].items() if "/" not in key}


def test_metrics_are_over_all_prompts_of_a_set_each_once_and_not_over_batches():
    assert values_of(evaluate(BATCHES)) == values_of(evaluate([*BATCHES, BATCHES[1]])) == pytest.approx(EXPECTED)
    metrics = evaluate(BATCHES, sets="quiz")
    assert list(metrics.compute()) == ["", "quiz"]
    assert values_of(metrics, "quiz") == values_of(metrics) == pytest.approx(EXPECTED)


def test_completions_that_do_not_count_are_as_if_they_were_not_there():
    (_, of_greedy), (rollouts, of_sampled) = (
        build(i, [[bool(c) for c in row] for row in right], n) for i, right, n in BATCHES[0]
    )
    counted = torch.tensor([True, False, True, True, True, True, True, True])
    of_greedy = replace(of_greedy, counted=torch.tensor([False, True]))
    of_sampled = replace(of_sampled, total=torch.where(counted, of_sampled.total, torch.nan), counted=counted)
    metrics = evaluation_means(4)
    add_prompts(metrics, of_greedy, (rollouts, of_sampled), [*ANSWERS[0], *ANSWERS[1]])
    # Of the first prompt three count: right with 7, wrong with 5 and with 6; pass@4 and maj@4 of it are not known.
    assert values_of(metrics) == pytest.approx(
        {
            **{"problems": 2, "greedy_accuracy": 0, "greedy_reward": 0, "avg@4": 1 / 6},
            **{"pass@1": 1 / 6, "pass@2": 1 / 3, "pass@4": 0, "maj@1": 1 / 6, "maj@2": 1 / 6, "maj@4": 0},
            **{"reward": 1 / 12, "completion_length": (8 / 3 + 2.75) / 2, "truncation_rate": 1 / 8},
        }
    )
    nothing = replace(of_sampled, counted=torch.zeros_like(counted))
    metrics = evaluation_means(4)
    add_prompts(metrics, replace(of_greedy, counted=torch.zeros(2, dtype=torch.bool)), (rollouts, nothing), [None] * 8)
    found = values_of(metrics)
    assert found.pop("problems") == 0 and all(value != value for value in found.values()), "no value, and not 0"


def test_records_hold_each_prompts_own_completions_and_survive_json():
    rollouts, rewards = build([4, 9], [[True, False], [False, True]], [[1, 1], [2, 5]], "quiz")
    greedy = (*build([4, 9], [[False], [True]], [[3], [5]], "quiz"), [None, "8"])
    rollouts.prompts[1].columns["answer"] = "raw"  # no name of ours is in the way of a row's
    records = prediction_records(greedy, (rollouts, rewards, ["7", None, "", "5"]), ["shown 4", "shown 9"])
    assert json.loads(json.dumps(records)) == records and records[1] == {
        **{"set": "quiz", "index": 9, "prompt": "shown 9", "answer": "a9", "completions": ["c2", "c3"]},
        "extracted_answers": ["", "5"],
        "lengths": [2, 5],
        "finished": [True, False],
        "rewards": [0.0, 0.5],
        "reward_parts": {"match": [0.0, 1.0], "half": [0.0, 0.5]},
        "correct": [False, True],
        "greedy": {
            **{"completion": "c1", "extracted_answer": "8", "length": 5, "finished": False},
            **{"reward": 0.5, "reward_parts": {"match": 1.0, "half": 0.5}, "correct": True},
        },
        "columns": {"answer": "raw"},
    }
    assert records[0]["completions"] == ["c0", "c1"]
