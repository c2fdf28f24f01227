"""Merge a low-rank update into the weight that it adapts, in float32, some rows at a time.

LoRA:   W' = W + s B A,   s = alpha / rank, or with rsLoRA alpha / sqrt(rank)
DoRA:   W' = m (W + s B A) / ||W + s B A||, norms taken over the inputs, one per output

Each expert's matrix has its own A and B. PEFT keeps the A of all experts one under another, [experts * rank, inputs], and the
columns of their B in turn, [outputs, rank * experts]. It reads Llama 4's [experts, inputs, outputs] as [experts, outputs,
inputs], so that A and B change places there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_NUMBERS = 2**20  # size of a temporary float32 copy, if the result has another dtype


@dataclass(frozen=True)
class LowRankUpdate:
    """An update of a weight."""

    lora_a: Tensor  # [rank, inputs], or of experts [experts, rank, inputs]
    lora_b: Tensor  # [outputs, rank], or [experts, outputs, rank]
    scale: float
    magnitudes: Tensor | None = None  # [outputs]; DoRA only

    def of_experts(self, number: int) -> "LowRankUpdate":
        """The update of this many experts, from A and B as PEFT keeps them."""
        lora_a = self.lora_a.reshape(number, -1, self.lora_a.shape[1])
        return LowRankUpdate(lora_a, self.lora_b.reshape(len(self.lora_b), -1, number).permute(2, 0, 1), self.scale)


@torch.no_grad()
def write_merged(destination: Tensor, first: int, weight: Tensor, update: LowRankUpdate | None, transposed: bool = False) -> None:
    """Write rows of a weight, starting at row `first`, with its update merged.

    Each number is computed in float32 and rounded once. This needs temporary float32 copies of the update.

    Args:
        destination: Receives the rows, [rows, ...] of any dtype and device. Unless it is float32 on the weight's device, another
            temporary copy is needed, of 2^20 numbers, or of one row if that is longer.
        first: Index of the first row.
        weight: [outputs, inputs], or [experts, ...]: experts are merged one after another, and each counts as one row.
        update: The update; None copies the weight.
        transposed: Whether the weight is [inputs, outputs], as in GPT-2's `Conv1D`.
    """
    if update is None:
        destination.copy_(weight[first : first + len(destination)])
        return
    if weight.dim() == 3:
        for number, target in enumerate(destination, start=first):
            own = LowRankUpdate(update.lora_a[number], update.lora_b[number], update.scale)
            write_merged(target, 0, weight[number], own, transposed)
        return
    if transposed and update.magnitudes is not None:  # norms run over the rows, so all rows are needed
        whole = torch.empty(weight.shape[::-1], dtype=torch.float32, device=weight.device)
        write_merged(whole, 0, weight.T, update)
        destination.copy_(whole.T[first : first + len(destination)])
        return
    left, right = update.lora_b.float(), update.lora_a.float()
    if transposed:
        left, right = right.T, left.T
    in_place = destination.dtype == torch.float32 and destination.device == weight.device
    step = len(destination) if in_place else max(1, _NUMBERS // max(1, weight.shape[1]))
    for start in range(0, len(destination), max(1, step)):
        target = destination[start : start + step]
        rows = slice(first + start, first + start + len(target))
        merged = target if in_place else torch.empty(target.shape, dtype=torch.float32, device=weight.device)
        merged.copy_(weight[rows]).addmm_(left[rows], right, alpha=update.scale)
        if update.magnitudes is not None:
            merged *= (update.magnitudes[rows].float() / torch.linalg.vector_norm(merged, dim=1))[:, None]
        if not in_place:
            target.copy_(merged)
