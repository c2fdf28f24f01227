"""Heads that are wide enough for the kernel of decoding: log-probabilities of sampling are those of a plain pass."""

import pytest
import torch
from tiny_decoders import SIZES, special_model
from tiny_models import engine_of
from transformers import LlamaConfig, MistralConfig, Qwen3Config

from hybrid_lightning.engine.cpu import attention_operators as kernels
from hybrid_lightning.engine.cpu import operators as of_rows
from hybrid_lightning.engine.cpu.build import library
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.types import Prompt

WIDE = {**SIZES, "hidden_size": 48, "num_attention_heads": 6, "pad_token_id": None}
CONFIGS = {
    "llama": LlamaConfig(**WIDE, head_dim=32),
    "qwen3": Qwen3Config(**WIDE, head_dim=64),
    "sliding window": MistralConfig(**WIDE, head_dim=32, sliding_window=6),
}
TEXTS = ("12+3=", "4=", "1-2-3-4-5=", "7*8=", "9+9+9=")
SAMPLES = 6


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize("kind", CONFIGS)
def test_sampling_logprobs_are_those_of_a_plain_pass_while_rows_leave(tokenizer, kind, monkeypatch):
    calls = []
    original = kernels.decode_attention
    monkeypatch.setattr(kernels, "decode_attention", lambda *parts: calls.append(len(parts[0])) or original(*parts))
    model, ids = special_model(CONFIGS[kind], std=0.15), [tokenizer(text).input_ids for text in TEXTS]
    sampler = Sampler(max_new_tokens=40)
    prompts = [Prompt(text=text) for text in TEXTS]
    draws = torch.Generator().manual_seed(3)
    rollouts = sampler.sample(
        engine_of(model), tokenizer, prompts, ids, SAMPLES, generator=draws, stops=sampler.stops(tokenizer, [2, 3, 4, 5])
    )
    sequences, lengths = rollouts.sequences, rollouts.sequences.completion_mask.sum(dim=1)
    assert lengths.min() < 12 and lengths.max() > 33, "the draw has to have short and long completions"
    if of_rows.library is library:
        assert len(calls) == 2 * (int(lengths.max()) - 1) and min(calls) < len(sequences) / 2
    else:
        assert not calls
    for row, length in enumerate(lengths.tolist()):
        completion = sequences.completion_ids[row, :length]
        prompt = torch.tensor(ids[row // SAMPLES])
        logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, completion[:, None]).squeeze(1)
        torch.testing.assert_close(rollouts.sampling_logprobs[row, :length], expected, atol=1e-4, rtol=0)
