"""Micro-batches that were saved by one number of ranks, dealt to another.

Denominators are those of the whole optimizer step, so that any way to deal its rows gives the same gradient.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hybrid_lightning.rollout.joining import join_sequences
from hybrid_lightning.rollout.micro_batches import join_rows
from hybrid_lightning.types import PolicyBatch


def deal(batches: Sequence[Sequence[PolicyBatch]], rank: int, ranks: int) -> list[PolicyBatch]:
    """The micro-batches of one rank.

    Args:
        batches: Of each rank that saved; the same number of each.
        rank: For which.
        ranks: How many there are now.
    """
    if len(batches) == ranks:
        return list(batches[rank])
    return [_share(_join(parts), rank, ranks) for parts in zip(*batches, strict=True)]


def _share(batch: PolicyBatch, rank: int, ranks: int) -> PolicyBatch:
    # Neighbours stay together, since they may share a prompt.
    return batch.rows(torch.arange(len(batch.sequences), device=batch.advantages.device).tensor_split(ranks)[rank])


def _join(parts: Sequence[PolicyBatch]) -> PolicyBatch:
    parts = [part for part in parts if len(part.sequences)] or parts[:1]
    width = max(part.sequences.completion_ids.shape[1] for part in parts)

    def joined(values: list[Tensor | None]) -> Tensor | None:
        return None if values[0] is None else join_rows([value for value in values if value is not None], width)

    return replace(
        parts[0],
        sequences=join_sequences([part.sequences for part in parts]),
        advantages=torch.cat([part.advantages for part in parts]),
        sampling_logprobs=join_rows([part.sampling_logprobs for part in parts], width),
        old_logprobs=joined([part.old_logprobs for part in parts]),
        ref_logprobs=joined([part.ref_logprobs for part in parts]),
        policy_mask=joined([part.policy_mask for part in parts]),
    )
