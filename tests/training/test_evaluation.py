import json
from dataclasses import replace

import pytest
import torch

from hybrid_lightning.rollout.batching import pad_left, pad_right
from hybrid_lightning.training.evaluation import add_prompts, evaluation_means, prediction_records
from hybrid_lightning.types import Completion, Prompt, Rewards, Rollout, Sequences

ANSWERS = ["7", "7", "5", "6", "5", None, "5", "6"]


def build(indices, correct, lengths, sets=""):
    """Rollouts of prompts with these indices; `correct` and `lengths`: a list a prompt. Completions of 5 tokens were cut."""
    prompts = tuple(Prompt(text=f"q{i}", answer=f"a{i}", index=i, set_name=sets) for i in indices)
    flat = [value for row in correct for value in row]
    completions = [[6] * length + [7] for row in lengths for length in row]  # an environment added a token after it
    sequences = Sequences(*pad_left([[5]] * len(flat), 0, "cpu"), *pad_right(completions, 0, "cpu"))
    sequences = replace(sequences, sampled_mask=sequences.completion_ids == 6)
    texts = tuple(Completion(f"c{i}", length, length < 5) for i, length in enumerate(n for row in lengths for n in row))
    values = torch.tensor(correct).float()
    rewards = Rewards(values / 2, {"match": values, "half": values / 2}, torch.tensor(correct))
    return Rollout(prompts, texts, sequences, torch.zeros(sequences.completion_ids.shape), rewards=rewards)


def test_metrics_are_of_greedy_and_sampled_completions_and_those_that_do_not_count_are_as_if_they_were_not_there():
    right = [[True, True, False, False], [False] * 4]
    made = build([0, 1], [[True], [False]], [[3], [3]]), build([0, 1], right, [[1, 2, 3, 4], [2, 2, 2, 5]], "quiz")
    of_greedy, of_sampled = (rollout.rewards for rollout in made)

    def values(*rewards):
        metrics = evaluation_means(4)
        add_prompts(metrics, *(replace(rollout, rewards=some) for rollout, some in zip(made, rewards, strict=True)), ANSWERS)
        found = metrics.compute()
        assert list(found) == ["", "quiz"]
        return {key: float(value) for key, value in found["quiz"].items() if "/" not in key}

    every = values(of_greedy, of_sampled)
    assert every == values(replace(of_greedy, counted=torch.ones(2, 1) > 0), replace(of_sampled, counted=torch.ones(2, 4) > 0))
    assert (every["greedy_accuracy"], every["avg@4"], every["maj@4"], every["pass@2"]) == (0.5, 0.25, 0.5, pytest.approx(5 / 12))
    counted = torch.tensor([[True, False, True, True], [True] * 4])
    of_greedy = replace(of_greedy, counted=torch.tensor([[False], [True]]))
    of_sampled = replace(of_sampled, total=torch.where(counted, of_sampled.total, torch.nan), counted=counted)
    # Of the first prompt three count: right with 7, wrong with 5 and with 6; pass@4 and maj@4 of it are not known.
    assert values(of_greedy, of_sampled) == pytest.approx(
        {
            **{"problems": 2, "greedy_accuracy": 0, "greedy_reward": 0, "avg@4": 1 / 6},
            **{"pass@1": 1 / 6, "pass@2": 1 / 3, "pass@4": 0, "maj@1": 1 / 6, "maj@2": 1 / 6, "maj@4": 0},
            **{"reward": 1 / 12, "completion_length": (8 / 3 + 2.75) / 2, "truncation_rate": 1 / 8},
        }
    )
    found = values(*(replace(rewards, counted=torch.zeros_like(rewards.counted)) for rewards in (of_greedy, of_sampled)))
    assert found.pop("problems") == 0 and all(value != value for value in found.values()), "no value, and not 0"


def test_records_hold_each_prompts_own_completions_and_survive_json():
    rollout = build([4, 9], [[True, False], [False, True]], [[1, 1], [2, 5]], "quiz")
    greedy = (build([4, 9], [[False], [True]], [[3], [5]], "quiz"), [None, "8"])
    rollout.prompts[1].columns["answer"] = "raw"  # no name of ours is in the way of a row's
    records = prediction_records(greedy, (rollout, ["7", None, "", "5"]), ["shown 4", "shown 9"])
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
