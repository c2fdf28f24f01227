"""Kernels of LoRA in training, as functions of float32 tensors. Their callers ask `calls.usable` first."""

import torch
from torch import Tensor

from hybrid_lightning.kernels import calls

# Numbers of both factors up to which the kernels are faster than libraries: with 4,096 they take 0.5 to 0.9 of the time, with
# 33,792 as much forward and 1.0 to 1.4 of it backward (two threads of a Zen 4, 912 and 655 rows). The bound lies between.
_MOST = 16_384


def pays(down: Tensor, up: Tensor) -> bool:
    """Whether these kernels are the faster ones for A and B."""
    return down.numel() + up.numel() <= _MOST


def add_low_rank(result: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Add s (x A') B' to a result in place.

    Args:
        result: [N, m], contiguous.
        x: [N, n].
        down: A [r, n].
        up: B [m, r].
        scaling: s.

    Returns:
        x A', [N, r], which the gradients need again.
    """
    x, rank = _dense_rows(x), len(down)
    low = x.new_empty(len(x), rank)
    sizes = (len(x), x.shape[1], len(up), rank, x.stride(0))
    calls.call("add_low_rank", x.dtype, (x, down.contiguous(), up.contiguous(), result, low), *sizes, scaling)
    return low


def low_rank_gradients(
    outer: Tensor, x: Tensor, low: Tensor, down: Tensor, up: Tensor, scaling: float, of_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of A and B from that of a result; those of x are added in place to what `of_x` has.

    Args:
        outer: [N, m].
        x: [N, n].
        low: x A' [N, r].
        down: A [r, n].
        up: B [m, r].
        scaling: s.
        of_x: [N, n], contiguous; None if nobody wants it.
    """
    outer, x, rank = _dense_rows(outer), _dense_rows(x), len(down)
    down, up = down.contiguous(), up.contiguous()
    of_down, of_up = torch.empty_like(down), torch.empty_like(up)
    tensors = (outer, x, low.contiguous(), down, up, of_x, of_down, of_up)
    sizes = (len(x), x.shape[1], len(up), rank, outer.stride(0), x.stride(0))
    calls.call("low_rank_gradients", x.dtype, tensors, *sizes, scaling)
    return of_down, of_up


def _dense_rows(part: Tensor) -> Tensor:
    return part if part.stride(1) == 1 else part.contiguous()
