"""From logits to a token: top-k and top-p (nucleus) truncation by the logits processors of transformers, and the draw."""

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [B, V] with every token outside the kept set at minus infinity; top-k first, as in `generate`."""
    unused = torch.empty(0, dtype=torch.long)  # these processors do not look at the tokens so far
    if top_k > 0:
        logits = TopKLogitsWarper(top_k)(unused, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(unused, logits)
    return logits


def draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token [B] per row of logits [B, V], by inverting the distribution function.

    `torch.multinomial` draws V exponential numbers for a token, which for a vocabulary of 50,000 takes longer on a CPU than the
    model's output layer; this draws one. Sums are in float64: V small float32 numbers would not add up to 1 well enough.
    """
    cumulative = logits.softmax(dim=-1).double().cumsum(dim=-1)
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device, generator=generator)
    # The first token whose cumulative probability exceeds the number: never one of probability zero.
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
