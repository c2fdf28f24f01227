"""Micro-batches by tokens: how many rows a forward and backward pass takes depends on how long they are."""

from collections.abc import Sequence

import torch

from hybrid_lightning.engine.packing import begins_group
from hybrid_lightning.types import Sequences


def split_by_tokens(sequences: Sequences, max_tokens: int, together: int = 1) -> list[slice]:
    """Cut rows into runs of neighbours of at most `max_tokens` tokens, which a single longer row exceeds.

    A prompt counts once for the neighbours that share it, as in the packed forward pass; a prompt whose completions are cut apart
    counts in each run.

    Args:
        sequences: B rows.
        max_tokens: Tokens of prompts and completions in a run.
        together: So many rows, counted from the first, are never cut apart; B is a multiple of it.

    Returns:
        Slices of the rows, in order.
    """
    prompts = sequences.prompt_mask.sum(dim=1).tolist()
    completions = sequences.completion_mask.sum(dim=1).tolist()
    begins: list[bool] = begins_group(sequences).tolist() if len(sequences) else []
    runs, start, used = [], 0, 0
    for row in range(0, len(prompts), together):
        unit = range(row, row + together)
        needed = sum(completions[i] + (prompts[i] if begins[i] else 0) for i in unit)
        alone = needed + (0 if begins[row] else prompts[row])  # where it begins a run
        if row > start and used + needed > max_tokens:
            runs.append(slice(start, row))
            start, used = row, alone
        else:
            used += alone if row == start else needed
    return [*runs, slice(start, len(prompts))] if prompts else []


def join_rows(parts: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """Stack [b, t] tensors of consecutive rows to [B, width], with zeros where a part is narrower."""
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
