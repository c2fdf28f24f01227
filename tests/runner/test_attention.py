"""Attention by products in 16 bits; that it is one softmax over prompt and own keys is seen in log-probabilities of families."""

import torch
from rounding import spread

from hybrid_lightning.runner import Backend
from hybrid_lightning.runner.attention import AttentionSettings, Masks, shared_attention

PROMPTS, HEADS, SAMPLES, REPEATS, LENGTH, WIDTH, SIZE = 2, 3, 4, 2, 5, 20, 8


def gradients(dtype):
    """The result and the gradients of queries, own keys and values, and the prompt's; the second prompt is shorter."""
    torch.manual_seed(0)
    query = torch.randn(PROMPTS, SAMPLES, HEADS, REPEATS, LENGTH, SIZE).permute(0, 2, 1, 3, 4, 5)
    own, prompt = torch.randn(2, PROMPTS, HEADS, SAMPLES, LENGTH, SIZE), torch.randn(2, PROMPTS, HEADS, WIDTH, SIZE)
    parts = [part.to(dtype).requires_grad_() for part in (query, *own, *prompt)]
    seen = torch.arange(WIDTH) < torch.tensor([WIDTH, WIDTH - 2])[:, None]
    masks = Masks(seen[:, None, None, None, None], torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())
    result = shared_attention(parts[0], (parts[3], parts[4]), (parts[1], parts[2]), masks, AttentionSettings(), Backend())
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    return [result.detach(), *torch.autograd.grad((result * weights).sum(), parts)]


def test_in_bfloat16_gradients_have_its_precision_and_the_inputs_dtypes():
    for half, whole in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert half.dtype == torch.bfloat16
        # What is rounded to bfloat16 on the way: inputs, scores, weights, and their gradients; sums are of float32.
        torch.testing.assert_close(half.float(), whole, atol=spread(6, torch.bfloat16) / 2 * float(whole.abs().max()), rtol=0)
