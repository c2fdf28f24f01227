"""Every family reads a prompt once for its completions, in sampling and in training, and gives its own forward pass's numbers."""

import inspect
import logging
import sys

import pytest
import torch
from tiny_families import FAMILIES, build_family
from tiny_models import VOCABULARY, build_tokenizer

from hybrid_lightning.rollout.batching import pad_left, pad_right
from hybrid_lightning.rollout.interface import SamplingRequest
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.runner import ModelRunner, padded, token_logprobs
from hybrid_lightning.types import Prompt, Sequences

# Tokens of prompts, some longer than the families' windows (32) and chunks (64), and the most tokens of each completion.
PROMPTS, LIMITS = (70, 3, 66), (24, 1, 2, 9, 24, 1)
PADDED = ["llama4_text", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "gpt_oss", "granitemoehybrid", "lfm2", "falcon_h1"]
PADDED += ["mamba2"]
SIZES = {"deepseek_v3": {"head_dim": 8, "num_key_value_heads": 4}}


def build(family):
    return build_family(family, std=0.15, **SIZES.get(family, {}))


def draw(lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def tokens_read(model):
    """The shapes of all ids that go through a model from now on."""
    shapes = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    return shapes


def alone(model, prompt, completion):
    """Log-probabilities of a completion by an unpadded forward pass of its own."""
    logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(dim=-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_own_numbers(model, rows, logprobs):
    """Log-probabilities [B, T] of rows of a prompt and a completion, and gradients."""
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(4))
    expected = [alone(model, *row) for row in rows]
    for found, wanted in zip(logprobs, expected, strict=True):
        assert found[: len(wanted)].tolist() == pytest.approx(wanted.tolist(), abs=1e-4)
    loss = sum((weight[: len(wanted)] * wanted).sum() for weight, wanted in zip(weights, expected, strict=True))
    found, wanted = gradients(model, (weights * logprobs).sum()), gradients(model, loss)
    assert found.keys() == wanted.keys()
    whole = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * whole, name


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_read_once_and_numbers_equal_each_sequence_alone(family):
    model, prompts = build(family), draw(PROMPTS)
    runner, shapes = ModelRunner(model), tokens_read(model)
    runner.prepare()
    assert runner.reads_padded == (family in PADDED) and runner.packs != runner.reads_padded
    assert not runner.passes()["shared prompts"]
    shapes.clear()
    request = SamplingRequest([Prompt(text="")] * 3, prompts, 2, torch.Generator().manual_seed(1), limits=LIMITS)
    sequences = Sampler(max_new_tokens=24).sample(runner, build_tokenizer(), request)
    once = 3 * max(PROMPTS) if runner.reads_padded else sum(PROMPTS) + -sum(PROMPTS) % 16
    first, *steps = (torch.Size(shape).numel() for shape in shapes)
    assert first == once and max(steps) <= 6
    logprobs, sequences = sequences.sampling_logprobs, sequences.sequences
    completions = [ids[mask].tolist() for ids, mask in zip(sequences.completion_ids, sequences.completion_mask, strict=True)]
    rows = [(prompts[number // 2], completion) for number, completion in enumerate(completions)]
    shapes.clear()
    trained, _ = token_logprobs(runner, sequences, 1.0)
    # Each prompt once, and what is read of completions, with little padding.
    read = sum(PROMPTS) + sum(len(completion) - 1 for completion in completions)
    assert read <= sum(torch.Size(shape).numel() for shape in shapes) <= read + 32
    assert (trained - logprobs).abs().max() < 1e-4
    assert_own_numbers(model, rows, trained)


@pytest.mark.parametrize("why", ["checkpointing", "sharded"])
def test_without_a_cache_each_row_is_read_with_its_prompt(why, monkeypatch):
    model, prompts, completions = build("qwen3_5_text"), draw(PROMPTS), draw((30, 2, 1, 5, 29, 1))
    runner = ModelRunner(model)
    if why == "sharded":
        monkeypatch.setattr(padded, "_is_sharded", lambda _: True)
    else:
        model.train().gradient_checkpointing_enable()
    rows = [(prompts[number // 2], completion) for number, completion in enumerate(completions)]
    ids, own = zip(*rows, strict=True)
    runner.prepare()
    assert why[:7] in runner.passes()["shared prompts"]
    shapes = tokens_read(model)
    logprobs, _ = token_logprobs(runner, Sequences(*pad_left(ids, 0, "cpu"), *pad_right(own, 0, "cpu")), 1.0)
    # Sharded ranks have to make the same number of passes. Without sharding, rows of about the same length are read together.
    assert shapes == ([(6, 70 + 29)] if why == "sharded" else [(3, 70 + 29), (1, 66), (2, 3 + 4)])
    assert_own_numbers(model, rows, logprobs)


def test_the_engine_says_it():
    runner = ModelRunner(build("qwen3_5_text"))
    runner.prepare()
    line = runner.description()
    assert "prompt sharing" not in line
    assert "training without padding off: its linear_attention layers would carry their state from" in line


def test_a_cache_that_cannot_be_continued_is_noticed(monkeypatch, caplog):
    # As a family's would be that copied keys alone.
    monkeypatch.setattr(padded._PromptCache, "get_recurrent_state", lambda *_, **__: None)
    model = build("mamba2")
    with caplog.at_level(logging.WARNING):
        runner = ModelRunner(model)
        runner.prepare()
    assert not runner.reads_padded and "for each completion" in caplog.text
    assert "prompt sharing in training off: copies of its cache change its logits" in runner.description()
    (prompt, completion) = draw((9, 5))
    logprobs, _ = token_logprobs(runner, Sequences(*pad_left([prompt], 0, "cpu"), *pad_right([completion], 0, "cpu")), 1.0)
    assert logprobs[0].tolist() == pytest.approx(alone(model, prompt, completion).tolist(), abs=1e-4)


# Functions of transformers' layers for which other packages have kernels, and where the tokens lie in their tensors.
KERNELS = {"causal_conv1d_fn": -1, "torch_chunk_gated_delta_rule": 1, "mamba2_chunk_scan": 1}


def kept_apart(function, axis):
    """A stand-in for a kernel that takes boundaries: transformers' own function, sequence by sequence."""

    def kernel(*arguments, cu_seqlens=None, seq_idx=None, **options):
        if cu_seqlens is None and seq_idx is None:
            return function(*arguments, **options)
        lengths = seq_idx[0].bincount() if cu_seqlens is None else cu_seqlens.diff()
        total, results, begin = int(lengths.sum()), [], 0

        def part(value, length):
            along = isinstance(value, torch.Tensor) and value.dim() > 2 and value.shape[axis] == total
            return value.narrow(axis, begin, length) if along else value

        for length in lengths.tolist():
            own = {name: part(value, length) for name, value in options.items()}
            results.append(function(*(part(value, length) for value in arguments), **own))
            begin += length
        if isinstance(results[0], tuple):
            return torch.cat([result[0] for result in results], dim=axis), None
        return torch.cat(results, dim=axis)

    return kernel


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_next", "granitemoehybrid", "lfm2", "falcon_h1", "mamba2"])
def test_rows_are_packed_where_layers_keep_sequences_apart(family, monkeypatch):
    """As on GPUs with the kernels of flash-linear-attention, causal-conv1d or mamba-ssm. Stand-ins compute for them here."""
    model, prompts = build(family).train(), draw((3, 2, 4))
    module = sys.modules[type(model).__module__]
    for name, axis in KERNELS.items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, kept_apart(inspect.unwrap(getattr(module, name)), axis))
    monkeypatch.setattr(module, "mamba2_split_conv1d_scan_combined", lambda *_, **__: None, raising=False)  # all at once
    runner = ModelRunner(model)
    runner.prepare()
    assert "without padding" not in runner.description() and not runner.packs
    completions = draw((70, 2, 1, 25, 37, 1))
    rows = [(prompts[number // 2], completion) for number, completion in enumerate(completions)]
    ids, own = zip(*rows, strict=True)
    sequences = Sequences(*pad_left(ids, 0, "cpu"), *pad_right(own, 0, "cpu"))
    shapes = tokens_read(model)
    logprobs, _ = token_logprobs(runner, sequences, 1.0)
    read = sum(len(prompt) + len(completion) - 1 for prompt, completion in rows)
    assert shapes == [(1, read + -read % 16)]
    assert_own_numbers(model, rows, logprobs)
    # Long prompts are rather read once for their completions.
    shapes.clear()
    token_logprobs(runner, Sequences(*pad_left([prompt * 20 for prompt in ids], 0, "cpu"), *pad_right(own, 0, "cpu")), 1.0)
    assert sum(torch.Size(shape).numel() for shape in shapes if shape[1] in (40, 60, 80)) <= 200


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_padded_where_layers_do_not_keep_sequences_apart(dtype, kernels, monkeypatch):
    """If this fails without kernels, transformers' layers do: the docs have to state that CPUs pack such families, too."""
    model = build_family("qwen3_5_text").to(dtype)
    module = sys.modules[type(model).__module__]
    for name in KERNELS if kernels else ():  # that take boundaries, and make nothing of them
        if hasattr(module, name):
            monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)))
    runner = ModelRunner(model)
    runner.prepare()
    assert "training without padding" in runner.description() and model.config._attn_implementation == "sdpa"
