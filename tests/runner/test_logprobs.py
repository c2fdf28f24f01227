import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rounding import LOGITS, additions_of, assert_same_sums
from tiny_decoders import SPECIAL, OfAccelerator, special_model
from tiny_decoders import build as build_adapted
from tiny_models import FAMILIES, VOCABULARY, build_model, runner_of
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_lightning.model.precision import checkpoint_gradients
from hybrid_lightning.rollout.batching import pad_left, pad_right
from hybrid_lightning.runner import Backend, ModelRunner, PackedSequences, logprobs_of_hidden, token_logprobs
from hybrid_lightning.runner.passes import prepacked_projection
from hybrid_lightning.types import Sequences

LONG = [7, 8, 9, 10, 11, 12, 13]
# Rows of the same prompt next to each other share its forward pass; the first three rows share nothing.
SEPARATE = ([[4, 5, 13, 6, 16], [9], LONG], [[5, 2], [4, 6, 7, 2], [9, 10, 11]])
SHARED = ([LONG, LONG, LONG, [9], [9], LONG], [[5, 2], [4, 6, 7, 2], [9, 10, 11], [2], [4, 4], [5, 2]])
# Tokens were added in the middle, at the end, at the start, of one row only, and all of a row.
INTERRUPTED = (SHARED[0], [[5, 6, 2, 7, 4], [4, 6, 7, 2, 9, 5], [9, 10, 11], [2, 3], [4, 4, 8], [5, 2]])
SAMPLED = [[1, 0, 0, 1, 1], [1, 0, 1, 0, 0, 0], [0, 0, 1], [1, 1], [0, 0, 0], [0, 1]]
CASES = {"separate": SEPARATE, "shared": SHARED, "interrupted": INTERRUPTED}


def build_sequences(case):
    prompts, completions = CASES[case]
    sequences = Sequences(*pad_left(prompts, 0, "cpu"), *pad_right(completions, 0, "cpu"))
    return replace(sequences, sampled_mask=pad_right(SAMPLED, 0, "cpu")[0] > 0) if case == "interrupted" else sequences


def plain(model, case, row, temperature):
    """Log-probabilities and entropies of one row, each token in its full context; 0 where a token was added."""
    prompt, completion = CASES[case][0][row], CASES[case][1][row]
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float() / temperature
    logprobs, sampled = logits.log_softmax(-1), torch.tensor(SAMPLED[row] if case == "interrupted" else [1] * len(completion))
    chosen = logprobs.gather(1, torch.tensor(completion)[:, None]).squeeze(1)
    return chosen * sampled, -(logprobs.exp() * logprobs).sum(-1) * sampled


def assert_gradients(model, loss, separate, tokens=40):
    """The loss of all rows together has the gradients of the rows' own losses, added up one by one."""
    loss.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row in separate:
        row.backward()
    for name, gradient in together.items():
        expected = model.get_parameter(name).grad
        assert_same_sums(gradient, expected, additions_of(model, tokens, backward=True), name=name)


def build(family):
    return special_model(SPECIAL[family]) if family in SPECIAL else build_model(family)


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize(
    ("family", "case", "frozen"),
    [
        *(("llama", "shared", True), ("gpt2", "shared", False), ("llama", "separate", False)),
        *((family, "interrupted", number % 2 == 1) for number, family in enumerate((*FAMILIES, *SPECIAL))),
    ],
)
def test_values_entropies_and_gradients_equal_separate_unpadded_passes(family, case, frozen, monkeypatch):
    model = build(family).requires_grad_(True)
    if frozen:  # as with an adapter; logits and their gradient are then made in one go, here block by block
        model.get_output_embeddings().requires_grad_(False)
        monkeypatch.setattr(Backend, "most_logits", lambda *_: 4 * VOCABULARY)
    sequences, before = build_sequences(case), plain(model, case, 1, 0.7)
    logprobs, entropy = token_logprobs(runner_of(model), sequences, temperature=0.7)
    separate = [plain(model, case, row, 0.7) for row in range(len(sequences))]
    assert runner_of(model).packs and all(map(torch.equal, separate[1], before)), "the model itself still works as before"
    for row, expected in enumerate(separate):
        found = [part[row, : len(expected[0])] for part in (logprobs, entropy)]
        assert_same_sums(found, [part.detach() for part in expected], additions_of(model, 11), LOGITS)
    assert not entropy.requires_grad and torch.isfinite(logprobs).all()
    assert not logprobs[~sequences.sampled_mask].any() and not entropy[~sequences.sampled_mask].any()
    assert_gradients(model, logprobs.sum(), (values.sum() for values, _ in separate))


@pytest.mark.parametrize(
    ("case", "tokens"),
    [
        ("shared", 7 + 1 + 7 + 1 + 3 + 2 + 1 + 1),
        ("separate", 5 + 1 + 7 + 1 + 3 + 2),
        ("interrupted", 7 + 1 + 7 + 4 + 2 + 2 + 1 + 0 + 1),
    ],
)
def test_every_prompt_goes_through_the_model_once_and_neither_padding_nor_what_nobody_reads_does(case, tokens, monkeypatch):
    model, predicted = build_model("llama"), []
    whole = PackedSequences.predicting
    monkeypatch.setattr(PackedSequences, "predicting", lambda *of: predicted.append(whole(*of)) or predicted[-1])
    token_logprobs(runner_of(model), build_sequences(case), 1.0)  # the first call tries the model out
    shapes = []
    model.model.register_forward_pre_hook(lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    token_logprobs(runner_of(model), build_sequences(case), 1.0)
    filled = -(-tokens // 16) * 16
    assert shapes == [(1, filled)], "prompts of each run of equal neighbours, and completions without their last sampled token"
    assert len(predicted[-1]) == int(build_sequences(case).sampled_mask.sum()), "what becomes logits"


def test_no_tensor_holds_the_logits_of_the_batch(monkeypatch):
    monkeypatch.setattr(Backend, "most_logits", lambda *_: 4 * VOCABULARY)
    model = build_model("llama").requires_grad_(True)
    sequences = build_sequences("shared")
    token_logprobs(runner_of(model), sequences, 1.0)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            outputs = result if isinstance(result, (tuple, list)) else (result,)
            sizes.extend(out.numel() for out in outputs if isinstance(out, torch.Tensor) and VOCABULARY in out.shape)
            return result

    with Sizes():
        token_logprobs(runner_of(model), sequences, 1.0)[0].sum().backward()
    assert int(sequences.completion_mask.sum()) > 8 and max(sizes) <= max(4 * VOCABULARY, VOCABULARY * 32)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.usefixtures("with_and_without_kernels")
def test_layers_made_again_for_the_backward_pass_use_the_same_kernels(family):
    found = []
    for checkpointing in (False, True):
        runner = build_adapted(family)
        if checkpointing:
            checkpoint_gradients(runner.model, runner.backend)
        token_logprobs(runner, build_sequences("shared"), 1.0)[0].sum().backward()
        found.append({name: p.grad for name, p in runner.model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)


@pytest.mark.usefixtures("with_and_without_kernels")
def test_completions_of_very_different_lengths_are_as_exact_and_hold_little_padding():
    model = build_model("qwen3").requires_grad_(True)
    lengths = torch.tensor([3, 60, 1, 33, 58, 2, 30, 1, 64, 5])
    prompts = torch.randint(3, 30, (2, 6)).repeat_interleave(5, dim=0)
    prompt_mask = torch.ones_like(prompts, dtype=torch.bool)
    prompt_mask[:5, :2] = False
    completions = torch.randint(3, 30, (10, 64))
    mask = torch.arange(64) < lengths[:, None]
    sequences = Sequences(prompts, prompt_mask, completions, mask)
    weights = torch.randn(mask.shape) * mask
    packed = PackedSequences(sequences, Backend())
    assert len(packed.bands) > 1
    places = sum(math.prod(band.shape) for band in packed.bands)
    assert places < 1.6 * int((lengths - 1).sum()) < 10 * 63  # one rectangle would have 10 x 63
    together = token_logprobs(runner_of(model), sequences, 1.0)
    alone = [token_logprobs(runner_of(model), sequences.rows(slice(row, row + 1)), 1.0) for row in range(10)]
    separate = [torch.cat([F.pad(part, (0, 64 - part.shape[1])) for part in parts]) for parts in zip(*alone, strict=True)]
    assert_same_sums(together, separate, additions_of(model, 70), LOGITS)
    assert_gradients(model, (together[0] * weights).sum(), [(separate[0] * weights).sum()], tokens=700)


@pytest.mark.parametrize(("packed", "frozen"), [(True, False), (True, True), (False, False)])
def test_the_gradient_of_the_entropy_is_there_where_it_is_asked_for(packed, frozen, monkeypatch):
    monkeypatch.setattr(Backend, "most_logits", lambda *_: 4 * VOCABULARY)
    if not packed:
        monkeypatch.setattr("hybrid_lightning.runner.model_runner.try_packing", lambda *_: None)
    model = build_model("llama").requires_grad_(True)
    if frozen:
        model.get_output_embeddings().requires_grad_(False)
    sequences = build_sequences("interrupted")
    weights = torch.randn(sequences.sampled_mask.shape, generator=torch.Generator().manual_seed(0))
    logprobs, entropy = token_logprobs(runner_of(model), sequences, 0.7, entropy_gradient=True)
    assert_same_sums((logprobs, entropy), token_logprobs(runner_of(model), sequences, 0.7), additions_of(model, 11), LOGITS)

    def value(alone, its_entropy, row=...):
        of_row = [part[row][..., : alone.shape[-1]] for part in (weights, weights.flip(0))]
        return 2 * (alone * of_row[0]).sum() - (its_entropy * of_row[1]).sum()

    separate = (value(*plain(model, "interrupted", row, 0.7), row) for row in range(len(sequences)))
    assert_gradients(model, value(logprobs, entropy), separate)
    with torch.no_grad():
        assert not token_logprobs(runner_of(model), sequences, 0.7, entropy_gradient=True)[1].requires_grad


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize(
    ("family", "trained", "dtype", "backend"),  # float32 under autocast; each with each backend
    [
        *(("llama", False, torch.bfloat16, Backend), ("llama", False, torch.float32, OfAccelerator)),
        *(("tied", True, torch.float32, Backend), ("tied", True, torch.float16, OfAccelerator)),
        *(("gemma2", False, torch.float16, Backend), ("gemma2", False, torch.bfloat16, OfAccelerator)),
        *(("granite", True, torch.bfloat16, Backend), ("granite", True, torch.float32, OfAccelerator)),
    ],
)
def test_logits_of_16_bits_are_float32_and_never_rounded(family, trained, dtype, backend):
    """In sampling and in an update; gradients have 16 bits."""
    model = build_model("llama", tie_word_embeddings=True) if family == "tied" else build(family)
    model.to(dtype).get_output_embeddings().requires_grad_(trained)
    runner, half = ModelRunner(model, backend()), torch.float16 if dtype == torch.float16 else torch.bfloat16
    numbers = torch.Generator().manual_seed(0)
    hidden = (4 * torch.randn(300, 32, generator=numbers)).to(half).requires_grad_(True)
    tokens = torch.randint(VOCABULARY, (300,), generator=numbers)
    weight = model.get_output_embeddings().weight.detach().to(half).double().requires_grad_(True)
    exact = hidden.detach().double().requires_grad_(True)
    logits = {"granite": lambda x: x / 3, "gemma2": lambda x: 2 * (x / 2).tanh()}.get(family, lambda x: x)(exact @ weight.T)
    expected = (logits / 0.7).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        with torch.no_grad():
            assert_same_sums(prepacked_projection(model, runner.backend)(hidden), logits.float(), 32)
        logprobs, _ = logprobs_of_hidden(runner, hidden, tokens, 0.7)
    assert_same_sums(logprobs, expected.float(), 32, float(logits.abs().max()))
    logprobs.sum().backward()
    expected.sum().backward()
    pairs = [(hidden.grad, exact.grad)] + [(model.get_output_embeddings().weight.grad, weight.grad)] * trained
    for found, wanted in pairs:
        assert_same_sums(found.to(half), wanted.to(half), 4)
