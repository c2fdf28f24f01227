"""Attention over shared prompts is one softmax over the keys of the prompt and the own ones."""

import pytest
import torch
from rounding import assert_same_sums, spread

from hybrid_lightning.engine import Backend, attention
from hybrid_lightning.engine.attention import AttentionSettings, Masks

PROMPTS, HEADS, SAMPLES, REPEATS, SIZE = 2, 3, 4, 2, 8
# For the longest queries with the longest prompt: over sizes, over keys, and in gradients also over the queries of a group.
ADDITIONS = 2 * (SIZE + 25) + SAMPLES * REPEATS * 5


def shared_attention(*parts):
    return attention.shared_attention(*parts, Backend())


def tensors(length, width, dtype=torch.float32):
    """Query, own keys and values, the prompt's, and masks, where the second prompt is shorter."""
    torch.manual_seed(0)
    query = torch.randn(PROMPTS, SAMPLES, HEADS, REPEATS, length, SIZE).permute(0, 2, 1, 3, 4, 5)
    own = torch.randn(2, PROMPTS, HEADS, SAMPLES, length, SIZE).unbind()
    prompt = torch.randn(2, PROMPTS, HEADS, width, SIZE).unbind()
    parts = [part.to(dtype).requires_grad_() for part in (query, *own, *prompt)]
    seen = torch.arange(width) < torch.tensor([width, width - 2])[:, None]
    return parts, Masks(seen[:, None, None, None, None], torch.ones(length, length, dtype=torch.bool).tril())


def gradients(function, parts, masks, settings):
    query, key, value, prompt_key, prompt_value = parts
    result = function(query, (prompt_key, prompt_value), (key, value), masks, settings)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    return [result.detach(), *torch.autograd.grad((result * weights).sum(), parts)]


@pytest.mark.parametrize(
    ("width", "scaling", "softcap", "on_cpu"),  # weights are kept for the backward pass at 3 keys, and made again at 20
    [(3, None, 2.0, True), (20, None, None, True), (20, 0.7, None, True), (20, None, 2.0, True), (20, 0.7, None, False)],
)
def test_values_and_gradients_equal_one_softmax_over_prompt_and_own_keys(width, scaling, softcap, on_cpu, monkeypatch):
    """By products, and on accelerators by torch's kernels."""
    monkeypatch.setattr(Backend, "is_cpu", lambda *_: on_cpu)
    length = 5
    parts, masks = tensors(length, width)
    settings = AttentionSettings(scaling=scaling, softcap=softcap)

    def plain(query, prompt, own, masks, settings):
        shared = [part[:, :, None].expand(-1, -1, SAMPLES, -1, -1) for part in prompt]
        keys, values = (torch.cat(both, dim=3) for both in zip(shared, own, strict=True))
        scores = torch.einsum("pkgrtd,pkgmd->pkgrtm", query, keys) * settings.factor(query)
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        seen = torch.cat([masks.prompt.expand(-1, -1, -1, -1, length, -1), masks.own.expand(PROMPTS, 1, 1, 1, -1, -1)], -1)
        return torch.einsum("pkgrtm,pkgmd->pkgrtd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)

    expected = gradients(plain, parts, masks, settings)
    assert_same_sums(gradients(shared_attention, parts, masks, settings), expected, ADDITIONS)


def test_in_bfloat16_gradients_have_its_precision_and_the_inputs_dtypes():
    (parts, masks), (halves, _) = tensors(5, 20), tensors(5, 20, torch.bfloat16)
    exact = gradients(shared_attention, parts, masks, AttentionSettings())
    for half, whole in zip(gradients(shared_attention, halves, masks, AttentionSettings()), exact, strict=True):
        assert half.dtype == torch.bfloat16
        # What is rounded to bfloat16 on the way: inputs, scores, weights, and their gradients; sums are of float32.
        torch.testing.assert_close(half.float(), whole, atol=spread(6, torch.bfloat16) / 2 * float(whole.abs().max()), rtol=0)
