"""From logits to a token: top-k and top-p (nucleus) truncation as by the logits processors of transformers, and the draw."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TopKLogitsWarper

_BLOCK = 256  # tokens


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [B, V] with every token outside the kept set at minus infinity; top-k first, as in `generate`."""
    if top_k > 0:
        unused = torch.empty(0, dtype=torch.long)  # this processor does not look at the tokens so far
        logits = TopKLogitsWarper(top_k)(unused, logits)
    if top_p < 1:
        logits = _top_p(logits, top_p)
    return logits


def _top_p(logits: Tensor, top_p: float) -> Tensor:
    """What `TopPLogitsWarper` gives, whose sums are in no order on a GPU."""
    ascending, order = logits.sort(dim=1, stable=True)
    left_out = running_sums(ascending.softmax(dim=1)) <= 1 - top_p
    left_out[:, -1] = False
    return logits.masked_fill(left_out.scatter(1, order, left_out), float("-inf"))


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
    ends = running_sums(blocks.sum(dim=2).double())
    target = uniform * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1)
    # The first token whose cumulative probability exceeds the number, and where rounding of the block's sum leaves none the last
    # with any probability: never one of probability zero.
    token = torch.searchsorted(running_sums(inside.double()), target - before, right=True).squeeze(1)
    last = _BLOCK - 1 - inside.flip(1).gt(0).long().argmax(dim=1)
    return block.squeeze(1) * _BLOCK + torch.minimum(token, last)


def running_sums(values: Tensor) -> Tensor:
    """Cumulative sums of [B, n] along the second axis, in an order that is always the same.

    That of `torch.cumsum` on a GPU is not, and `trainer.deterministic=true` refuses it there.
    """
    return values.cumsum(dim=1) if values.device.type == "cpu" else sums_by_doubling(values)


def sums_by_doubling(values: Tensor) -> Tensor:
    """The same by about log2(n) additions of whole tensors."""
    step = 1
    while step < values.shape[1]:  # each number is the sum of the last `step` ones, or of all before
        values = torch.cat([values[:, :step], values[:, step:] + values[:, :-step]], dim=1)
        step *= 2
    return values
