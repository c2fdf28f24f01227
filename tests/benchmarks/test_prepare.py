"""What both sides are given."""

import random

import pytest
import torch
from benchmark_modules import prepare, reward, workloads
from tiny_models import VOCABULARY, build_model, build_tokenizer

from hybrid_lightning.errors import ModelError


def workload(**sizes):
    return workloads.Workload("test", **{"prompts": 3, "prompt_tokens": 9, "max_new_tokens": 12, "dtype": "float32", **sizes})


def test_prompts_have_exactly_the_wanted_length_and_depend_on_the_seed_alone():
    tokenizer = build_tokenizer()
    first = prepare.make_prompts(workload(), tokenizer, 6, random.Random(1))
    assert len(set(first)) == 6
    assert [len(tokenizer(text)["input_ids"]) for text in first] == [9] * 6
    assert first == prepare.make_prompts(workload(), tokenizer, 6, random.Random(1))
    assert first != prepare.make_prompts(workload(), tokenizer, 6, random.Random(2))


def test_prompts_that_cannot_be_written_are_an_error(monkeypatch):
    monkeypatch.setattr(prepare, "single_tokens", lambda tokenizer, extra: [])
    with pytest.raises(ModelError, match="exactly 9 tokens"):
        prepare.make_prompts(workload(), build_tokenizer(), 1, random.Random(0))


def test_tiny_asks_what_the_embedded_default_asks():
    prompts = prepare.make_prompts(workload(prompt_tokens=None), build_tokenizer(), 4, random.Random(0))
    assert all(text[0].isdigit() and "*" in text and text.endswith("=") for text in prompts)


def test_the_end_that_is_never_sampled():
    model, tokenizer = build_model("llama"), build_tokenizer()
    prepare.prepare(workload(stop_probability=0.0), model, tokenizer, 1, 0)
    assert tokenizer.eos_token_id >= VOCABULARY
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert tokenizer.pad_token_id < VOCABULARY


def test_the_ends_that_are_sampled_have_the_wanted_probability(monkeypatch):
    monkeypatch.setattr(prepare, "COMMON_TOKENS", 2)
    model, tokenizer = build_model("llama"), build_tokenizer()
    load = workload(stop_probability=0.2)
    prompts = prepare.prepare(load, model, tokenizer, 1, 0)
    never, *ends = model.generation_config.eos_token_id
    assert never == tokenizer.eos_token_id
    probabilities = prepare.token_probabilities(model, tokenizer, prompts, load.max_new_tokens, 0)
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-4)
    assert 0.15 < float(probabilities[ends].sum()) <= 0.2


def test_common_tokens_do_not_end_completions(monkeypatch):
    monkeypatch.setattr(prepare, "COMMON_TOKENS", 1)
    probabilities = torch.tensor([0.05, 0.6, 0.2, 0.1, 0.05])
    assert prepare.ending_tokens(probabilities, 0.41, random.Random(0)) == [0, 2, 3, 4]
    assert sum(probabilities[prepare.ending_tokens(probabilities, 0.1, random.Random(0))]) <= 0.1 + 1e-6


def test_no_group_ties_even_if_all_completions_are_equal():
    rewards = reward.hashed_reward(["same"] * 8)
    assert len(set(rewards)) == 8
    assert all(0 <= value < 1 for value in rewards)
    assert rewards == reward.hashed_reward(["same"] * 8)
