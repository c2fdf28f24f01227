"""Top-k and top-p (nucleus) truncation, by the logits processors of transformers."""

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
