import random
from dataclasses import replace

import pytest
import torch
from tiny_models import VOCABULARY, build_model, build_tokenizer

from benchmarks import prepare
from benchmarks.workloads import WORKLOADS, Workload
from hybrid_lightning.errors import ModelError


def workload(mean_tokens=12):
    return Workload("test", prompts=3, prompt_tokens=9, max_new_tokens=12, mean_tokens=mean_tokens, dtype="float32")


def test_prompts_have_exactly_the_wanted_length_and_depend_on_the_seed_alone(monkeypatch):
    tokenizer = build_tokenizer()
    first, again, other = (prepare.make_prompts(workload(), tokenizer, 6, random.Random(seed)) for seed in (1, 1, 2))
    assert len(set(first)) == 6 and first == again != other
    assert [len(tokenizer(text)["input_ids"]) for text in first] == [9] * 6
    monkeypatch.setattr(prepare, "single_tokens", lambda tokenizer, extra: [])
    with pytest.raises(ModelError, match="exactly 9 tokens"):
        prepare.make_prompts(workload(), tokenizer, 1, random.Random(0))


def test_the_end_that_is_never_sampled_and_those_that_give_the_wanted_length(monkeypatch):
    monkeypatch.setattr(prepare, "COMMON_TOKENS", 2)
    model, tokenizer = build_model("llama"), build_tokenizer()
    prepare.prepare(workload(), model, tokenizer, 1, 0)
    assert tokenizer.eos_token_id >= VOCABULARY
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert tokenizer.pad_token_id < VOCABULARY
    model, tokenizer = build_model("llama"), build_tokenizer()
    load = workload(mean_tokens=6)
    prompts = prepare.prepare(load, model, tokenizer, 1, 0)
    never, *ends = model.generation_config.eos_token_id
    assert never == tokenizer.eos_token_id
    model.generation_config.eos_token_id = [never]
    probabilities = prepare.token_probabilities(model, tokenizer, prompts, load.max_new_tokens, 0)
    assert torch.allclose(probabilities.sum(dim=-1), torch.ones(3, 12), atol=1e-4)
    assert prepare.expected_length(probabilities, ends) == pytest.approx(6, abs=1)


def test_a_random_model_in_the_shape_of_qwen3_5(monkeypatch):
    monkeypatch.setattr(prepare, "resolve_model", lambda model: model)
    monkeypatch.setattr(prepare, "load_tokenizer", lambda source: build_tokenizer())
    model, tokenizer = prepare.load(replace(WORKLOADS["qwen3_5_tiny_short"], dtype="bfloat16"))
    kinds = model.config.layer_types
    assert len(kinds) == 4 and kinds.count("full_attention") == 1 and model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer) == VOCABULARY


def test_the_expected_length_of_a_constant_chance_and_the_tokens_that_give_a_length(monkeypatch):
    probabilities = torch.tensor([0.75, 0.125, 0.125]).expand(2, 3, 3)
    assert prepare.expected_length(probabilities, [1, 2]) == pytest.approx(1 + 0.75 + 0.75**2)
    # Common tokens do not end completions.
    monkeypatch.setattr(prepare, "COMMON_TOKENS", 1)
    probabilities = torch.tensor([0.1, 0.6, 0.1, 0.1, 0.1]).expand(1, 50, 5)
    assert prepare.ending_tokens(probabilities, 2.6, random.Random(0)) == [0, 2, 3, 4]
    assert len(prepare.ending_tokens(probabilities, 5.1, random.Random(0))) == 2
