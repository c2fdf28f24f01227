import logging

import pytest
import torch
from rounding import LOGITS, additions_of, assert_same_sums
from test_logprobs import SHARED, build_sequences, plain
from tiny_decoders import SIZES, SPECIAL, special_model
from tiny_models import VOCABULARY, build_model, build_tokenizer, runner_of
from transformers import BloomConfig, LlamaConfig, MambaConfig, MistralConfig, Qwen3Config

from hybrid_lightning.rollout.interface import SamplingRequest
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.runner import packing, token_logprobs
from hybrid_lightning.runner.cpu import operators as kernels
from hybrid_lightning.runner.cpu.build import library
from hybrid_lightning.types import Prompt

FOREIGN = {
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "mamba": MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
}


def packs(model):
    runner = runner_of(model)
    runner.prepare()
    return runner.packs


# Heads that are wide enough for the kernel of decoding; only these are.
SIX_HEADS = {**SIZES, "hidden_size": 48, "num_attention_heads": 6}
WIDE = {
    "llama, wide": LlamaConfig(**SIX_HEADS, head_dim=32),
    "qwen3, wide": Qwen3Config(**SIX_HEADS, head_dim=64),
    "mistral, wide": MistralConfig(**SIX_HEADS, head_dim=32, sliding_window=6),
}


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize("family", [*SPECIAL, *WIDE])
def test_decoding_agrees_with_training_in_special_families(family, monkeypatch):
    decoded, original = [], kernels.decode_attention
    monkeypatch.setattr(kernels, "decode_attention", lambda *parts: decoded.append(len(parts[0])) or original(*parts))
    model, tokenizer = special_model({**SPECIAL, **WIDE}[family]), build_tokenizer()
    prompts, draws = [SHARED[0][0], SHARED[0][3]], torch.Generator().manual_seed(1)
    request = SamplingRequest([Prompt(text="")] * 2, prompts, 4, draws)
    rollouts = Sampler(max_new_tokens=40).sample(runner_of(model), tokenizer, request)
    logprobs, _ = token_logprobs(runner_of(model), rollouts.sequences, 1.0)
    mask = rollouts.sequences.completion_mask
    assert (len(set(decoded)) > 1) == (family in WIDE and kernels.library is library), "rows leave as they end"
    torch.testing.assert_close(logprobs[mask], rollouts.sampling_logprobs[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FOREIGN)
def test_a_family_that_cannot_be_packed_keeps_its_own_way_and_says_what_that_costs(family, caplog):
    model = special_model(FOREIGN[family])
    with caplog.at_level(logging.WARNING):
        assert not packs(model)
        assert not packs(model)
    # Mamba's layers continue from a state with one token alone, and transformers pads it on the left as others.
    assert ("recomputed for each completion" in caplog.text) == (family == "mamba")
    logprobs, _ = token_logprobs(runner_of(model), build_sequences("shared"), 1.0)
    for row in range(3):
        expected, _ = plain(model, "shared", row, 1.0)
        assert_same_sums(logprobs[row, : len(expected)], expected, additions_of(model, 11), LOGITS)


@pytest.mark.usefixtures("with_and_without_kernels")
def test_attention_that_differs_is_noticed(monkeypatch, caplog):
    # The layers of this model see less than its config allows.
    monkeypatch.setattr("hybrid_lightning.runner.packing.visible", lambda queries, keys, window: (keys <= queries) & (keys != 1))
    narrow = packing.packed_attention
    monkeypatch.setattr(packing, "packed_attention", lambda *parts: narrow(*parts[:4], 3, *parts[5:]))
    model = build_model("llama")
    assert not packs(model) and not caplog.text
    said = runner_of(model).description()
    assert "prompt sharing" not in said, "by copies of its cache"
    assert "training without padding off: packed sequences change its logits" in said
