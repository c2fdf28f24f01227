"""The norm of a gradient that may lie in parts on several ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybrid_lightning.sharding.ranks import sum_over_ranks


def total_norm(gradients: Sequence[Tensor], device: torch.device, local_parts: bool = False) -> Tensor:
    """Norm of all gradients together in float32, the same on every rank.

    Args:
        gradients: Of this rank.
        device: Of the result, and that the ranks train on; gradients may lie on the CPU beside it.
        local_parts: Each rank has a part of its own of the gradients, and they do not say so themselves as a `DTensor` does.
    """
    norm = torch.zeros((), device=device)
    if gradients and all(gradient.dtype == torch.float32 for gradient in gradients):
        norm = torch.nn.utils.get_total_norm(gradients)
    elif gradients:  # of bfloat16 gradients torch's own has the three digits of bfloat16
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
    if isinstance(norm, DTensor):
        return norm.full_tensor().to(device)
    norm = norm.to(device)
    return sum_over_ranks(norm.square()).sqrt() if local_parts else norm
