"""Matrix products by oneDNN, where torch's own are slower on a CPU.

On CPUs with AVX-512 torch multiplies float32 matrices by MKL, which uses AVX2 on processors of other makers: oneDNN took 0.37 ms
for [950, 128] x [128, 384] where MKL took 0.83 (AMD EPYC, Zen 5, one thread), with sums of the same precision. On a Zen 4 both
ran at the processor's peak. And a weight that many products use can be kept in the order in which oneDNN reads it: in bfloat16
that took 0.8 of the time at 32 rows and 0.6 at 8 (Zen 5).

torch offers oneDNN's products only as the operator that its compiler emits. Where that is missing, and for all else, these
functions are torch's products.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_FEWEST = 500_000  # multiplications: below, the call costs more than it saves


@cache
def _has_onednn() -> bool:
    """Whether the operators are there, and the processor is one where they are faster."""
    packed = hasattr(torch.ops, "mkldnn") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    reorder = hasattr(torch.ops, "mkldnn") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and packed and reorder and "AVX512" in torch.backends.cpu.get_cpu_capability()


def _onednn(rows: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    return result


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows @ weight.T`, without a gradient.

    Args:
        rows: [N, n], in any layout.
        weight: [m, n], in any layout.

    Returns:
        [N, m].
    """
    count = rows.shape[0] * rows.shape[1] * weight.shape[0]
    if rows.dtype == torch.float32 and rows.device.type == "cpu" and count >= _FEWEST and _has_onednn():
        return _onednn(rows, weight)
    return F.linear(rows, weight)


def packs(dtype: torch.dtype) -> bool:
    """Whether `prepacked_product` holds a copy of a weight of this dtype on this CPU; it lies where torch counts no tensor."""
    return dtype in (torch.float32, torch.bfloat16) and _has_onednn()


def prepacked_product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with a weight [m, n] that does not change: a function of rows [N, n] that gives [N, m], without a gradient.

    It may hold a copy of the weight.
    """
    if weight.device.type == "cpu" and packs(weight.dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        return lambda rows: _onednn(rows, packed)
    return lambda rows: F.linear(rows, weight)
