"""The norm of a gradient that may lie in parts on several ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybrid_lightning.sharding.ranks import sum_over_ranks


def total_norm(gradients: Sequence[Tensor], device: torch.device, local_parts: bool = False) -> Tensor:
    """Norm of all gradients together, the same on every rank.

    Args:
        gradients: Of this rank.
        device: Of the result.
        local_parts: Each rank has a part of its own of the gradients, and they do not say so themselves as a `DTensor` does.
    """
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)
    if isinstance(norm, DTensor):
        return norm.full_tensor()
    return sum_over_ranks(norm.square()).sqrt() if local_parts else norm
