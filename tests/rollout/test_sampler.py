"""Our sampler against `generate` and plain passes; tests/with_vllm/test_engines.py has the promises of every engine."""

import pytest
import torch
from tiny_models import FAMILIES, SIZES, build_model, build_tokenizer, plain_logprobs, runner_of, tokens_of
from transformers import AutoModelForCausalLM, MinPLogitsWarper, Qwen3_5TextConfig, TopPLogitsWarper

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout import sampler
from hybrid_lightning.rollout.interface import SamplingRequest
from hybrid_lightning.rollout.sampler import Sampler, draw_tokens, filter_logits, sums_by_doubling
from hybrid_lightning.types import Prompt

TEXTS = ("12+3=", "what is 7 plus 15?\n", "9=")


def sample(model, tokenizer, samples=3, seed=0, texts=TEXTS, greedy=False, **settings):
    prompts, ids = [Prompt(text=text, index=i) for i, text in enumerate(texts)], [tokenizer(text).input_ids for text in texts]
    request = SamplingRequest(prompts, ids, samples, torch.Generator().manual_seed(seed), greedy)
    return Sampler(**{"max_new_tokens": 12, **settings}).sample(runner_of(model), tokenizer, request)


def assert_plain_logprobs(model, rollouts, temperature=1.0):
    """The log-probabilities of sampling equal the ones that unpadded forward passes compute."""
    for row, found in enumerate(rollouts.sampling_logprobs):
        expected = plain_logprobs(model, rollouts.sequences, row, temperature)
        torch.testing.assert_close(found[: len(expected)], expected, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_logprobs_equal_a_plain_unpadded_forward_pass(tokenizer, family):
    # Long enough that decoding widens what it attends to, and moves its cache.
    model = build_model(family, std=0.1)
    rollouts = sample(model, tokenizer, temperature=0.7, max_new_tokens=40)
    lengths = rollouts.sequences.completion_mask.sum(dim=1)
    assert lengths.max() > 32 and lengths.min() < 20, "rows have to leave before others, which does not change these"
    assert_plain_logprobs(model, rollouts, 0.7)


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(tokenizer, family):
    model = build_model(family)
    rollouts = sample(model, tokenizer, samples=1, greedy=True)
    for row in range(len(TEXTS)):
        prompt, completion = tokens_of(rollouts.sequences, row)
        ids = torch.tensor([prompt])
        stops = {"max_new_tokens": 12, "eos_token_id": 2, "pad_token_id": 0}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **stops)
        assert expected[0].tolist() == prompt + completion


def test_layers_that_keep_a_state_instead_of_keys_are_sampled_from(tokenizer):
    sizes = {"head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
    kinds = {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3_5TextConfig(**SIZES, **sizes, **kinds)).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.2)
    rollouts = sample(model, tokenizer, samples=4, max_new_tokens=30)
    assert rollouts.sequences.completion_mask.sum(dim=1).min() < 20, "rows have to leave before others"
    assert_plain_logprobs(model, rollouts)


def test_null_in_a_config_is_not_a_stop_string():
    assert Sampler(max_new_tokens=1, stop=None).stop == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"stop": "x"}, "list of strings"),
        ({"stop": [""]}, "empty string"),
        ({"max_new_tokens": 126}, "128 positions"),
    ],
)
def test_impossible_settings_are_refused(tokenizer, settings, message):
    with pytest.raises(ConfigError, match=message):
        sample(build_model("llama"), tokenizer, **settings)


def test_a_completion_knows_that_its_prompt_began_the_reasoning():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    model = build_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    texts = ("12+3=", "12+3=<think>\n", "12+3=<think>\n\n</think>\n\n")
    rollouts = sample(model, tokenizer, samples=2, texts=texts, max_new_tokens=3)
    assert [completion.thinking for completion in rollouts.completions] == [False, False, True, True, False, False]


@pytest.mark.parametrize("doubling", [False, True], ids=["as on a CPU", "as on a GPU"])
def test_draws_and_top_p_equal_cumulative_sums_and_min_p_equals_transformers(doubling, monkeypatch):
    for size in (1, 8, 257):
        whole = torch.randint(9, (3, size)).double()  # sums of these are exact in any order
        assert torch.equal(sums_by_doubling(whole), whole.cumsum(dim=1))
    logits = 3 * torch.randn(40, 600, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(40, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = TopPLogitsWarper(0.8)(torch.empty(0), logits)
    tokens = draw_tokens(logits, uniform)
    if doubling:
        monkeypatch.setattr(sampler, "running_sums", sums_by_doubling)
    assert torch.equal(filter_logits(logits, 0, 0.8), expected)
    assert torch.equal(draw_tokens(logits, uniform), tokens)
    for min_p in (0.01, 0.3, 1.0):
        kept = filter_logits(logits, 0, 1.0, min_p)
        assert torch.equal(kept, MinPLogitsWarper(min_p)(torch.empty(0), logits))
        assert 0 < float(kept.isfinite().float().mean()) < 1
