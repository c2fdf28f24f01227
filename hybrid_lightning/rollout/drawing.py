"""From logits to a token: top-k and top-p (nucleus) truncation by the logits processors of transformers, and the draw."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

_BLOCK = 256  # tokens


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [B, V] with every token outside the kept set at minus infinity; top-k first, as in `generate`."""
    unused = torch.empty(0, dtype=torch.long)  # these processors do not look at the tokens so far
    if top_k > 0:
        logits = TopKLogitsWarper(top_k)(unused, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(unused, logits)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token [B] per row of logits [B, V] for uniform numbers [B, 1] float64, by inverting the distribution function.

    `torch.multinomial` draws V exponential numbers for a token, which for a vocabulary of 50,000 takes longer on a CPU than the
    model's output layer; this takes one, and looks it up in blocks of tokens first, so that only one block is summed up token by
    token. Running sums are in float64: V small float32 numbers would not add up to 1 well enough.
    """
    width = logits.shape[1]
    probabilities = logits.softmax(dim=-1)
    if width % _BLOCK:
        probabilities = F.pad(probabilities, (0, -width % _BLOCK))
    blocks = probabilities.view(len(logits), -1, _BLOCK)
    ends = blocks.sum(dim=2).double().cumsum(dim=1)
    target = uniform * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1)
    # The first token whose cumulative probability exceeds the number, and where rounding of the block's sum leaves none the last
    # with any probability: never one of probability zero.
    token = torch.searchsorted(inside.double().cumsum(dim=1), target - before, right=True).squeeze(1)
    last = _BLOCK - 1 - inside.flip(1).gt(0).long().argmax(dim=1)
    return block.squeeze(1) * _BLOCK + torch.minimum(token, last)
