"""Pad rows, split them by their number of tokens, join them, distribute them over ranks, and save them.

Axes: B rows (sequences), S prompt tokens (left-padded), T completion tokens (right-padded).

How many rows fit into a forward and backward pass depends on their length. The denominators of a loss are those of the whole
optimizer step, so that the gradient does not depend on how the rows of a step are split, or redistributed over another number of
ranks than that which saved them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.engine import begins_group
from hybrid_lightning.types import PolicyBatch, Rewards, Rollouts, Sequences


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up rows: the tokenizer's own, or the end-of-sequence token where it has none. No mask includes it."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Pad rows on the left. Returns ids [B, S] int64 and the mask [B, S] bool, True on real tokens."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], dtype=torch.long, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device)[None] >= width - lengths[:, None]


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Pad rows on the right. Returns ids [B, T] int64 and the mask [B, T] bool, True on real tokens."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [pad_id] * (width - len(row)) for row in rows], dtype=torch.long, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device)[None] < lengths[:, None]


def split_by_tokens(sequences: Sequences, max_tokens: int, together: int = 1) -> list[slice]:
    """Split rows into runs of neighbours with at most `max_tokens` tokens. Only a single row that is longer exceeds that.

    The tokens of a prompt count once for neighbours that share it, as in the packed forward pass. If its completions are in
    several runs, the prompt counts in each of them.

    Args:
        sequences: B rows.
        max_tokens: Largest number of tokens of prompts and completions in a run.
        together: Number of rows that stay together, counted from the first row; B must be a multiple of it.

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
        alone = needed + (0 if begins[row] else prompts[row])  # tokens of the unit if it begins a run
        if row > start and used + needed > max_tokens:
            runs.append(slice(start, row))
            start, used = row, alone
        else:
            used += alone if row == start else needed
    return [*runs, slice(start, len(prompts))] if prompts else []


def join_rows(parts: Sequence[Tensor], width: int | None = None) -> Tensor:
    """Stack tensors of consecutive rows, [b, t] each, to [B, width], with zeros on the right of narrower parts.

    Args:
        parts: The tensors; b and t may differ. They may also be [b] each, which become [B].
        width: Columns of the result; None for those of the widest part.
    """
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    columns = max(part.shape[1] for part in parts) if width is None else width
    return torch.cat([pad(part, (0, columns - part.shape[1])) for part in parts])


def join_sequences(parts: Sequence[Sequences]) -> Sequences:
    """Concatenate sequences; prompts stay left-padded and completions right-padded."""
    start = max(part.prompt_ids.shape[1] for part in parts)
    steps = [part.weights_step for part in parts]

    def left(values: list[Tensor]) -> Tensor:
        return torch.cat([pad(value, (start - value.shape[1], 0)) for value in values])

    return Sequences(
        left([part.prompt_ids for part in parts]),
        left([part.prompt_mask for part in parts]),
        join_rows([part.completion_ids for part in parts]),
        join_rows([part.completion_mask for part in parts]),
        None if any(step is None for step in steps) else join_rows([step for step in steps if step is not None]),
        join_rows([part.sampled_mask for part in parts]),
    )


def join_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """Concatenate rollouts with the same number of samples per prompt."""
    if len(parts) == 1:
        return parts[0]
    return Rollouts(
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        sequences=join_sequences([part.sequences for part in parts]),
        completions=tuple(completion for part in parts for completion in part.completions),
        sampling_logprobs=join_rows([part.sampling_logprobs for part in parts]),
        finished=torch.cat([part.finished for part in parts]),
        samples_per_prompt=parts[0].samples_per_prompt,
    )


def join_rewards(parts: Sequence[Rewards]) -> Rewards:
    """Concatenate rewards."""
    counted = [torch.ones_like(part.correct) if part.counted is None else part.counted for part in parts]
    return replace(
        parts[0],
        total=torch.cat([part.total for part in parts]),
        correct=torch.cat([part.correct for part in parts]),
        parts={name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts},
        counted=None if all(part.counted is None for part in parts) else torch.cat(counted),
    )


def batches_of_rank(batches: Sequence[Sequence[PolicyBatch]], rank: int, ranks: int) -> list[PolicyBatch]:
    """The micro-batches of one rank, from those that another number of ranks may have saved.

    Args:
        batches: The micro-batches of each rank that saved, the same number for each.
        rank: The rank that gets the result.
        ranks: How many ranks there are now.
    """
    if len(batches) == ranks:
        return list(batches[rank])
    return [_rows_of_rank(_join_batches(parts), rank, ranks) for parts in zip(*batches, strict=True)]


def _rows_of_rank(batch: PolicyBatch, rank: int, ranks: int) -> PolicyBatch:
    # tensor_split keeps neighbours together, which may share a prompt.
    return batch.rows(torch.arange(len(batch.sequences), device=batch.advantages.device).tensor_split(ranks)[rank])


def _join_batches(parts: Sequence[PolicyBatch]) -> PolicyBatch:
    parts = [part for part in parts if len(part.sequences)] or parts[:1]
    width = max(part.sequences.completion_ids.shape[1] for part in parts)

    def joined(values: list[Tensor | None]) -> Tensor | None:
        return None if values[0] is None else join_rows([value for value in values if value is not None], width)

    return replace(
        parts[0],
        sequences=join_sequences([part.sequences for part in parts]),
        advantages=join_rows([part.advantages for part in parts], width),
        sampling_logprobs=join_rows([part.sampling_logprobs for part in parts], width),
        old_logprobs=joined([part.old_logprobs for part in parts]),
        ref_logprobs=joined([part.ref_logprobs for part in parts]),
        policy_mask=joined([part.policy_mask for part in parts]),
    )


def batch_to_state(batch: PolicyBatch) -> dict[str, Any]:
    """A micro-batch as plain data and tensors on the CPU, for a checkpoint."""
    state = vars(batch.to("cpu"))
    return {**state, "sequences": dict(vars(state["sequences"]))}


def batch_from_state(state: dict[str, Any]) -> PolicyBatch:
    """The micro-batch whose state `batch_to_state` returned."""
    return PolicyBatch(**{**state, "sequences": Sequences(**state["sequences"])})
