"""The norm of a gradient that may lie in parts on several ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Norm of all gradients together, the same on every rank."""
    if not gradients:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
