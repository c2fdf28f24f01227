"""Rows of several batches below each other, whose padding is of different widths."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybrid_lightning.rollout.micro_batches import join_rows
from hybrid_lightning.types import Rewards, Rollouts, Sequences


def join_columns(parts: Sequence[Tensor]) -> Tensor:
    """Stack [b, t] tensors to [B, T], with zeros on the right where a part is narrower than the widest."""
    return join_rows(parts, max(part.shape[1] for part in parts))


def join_sequences(parts: Sequence[Sequences]) -> Sequences:
    """Stack sequences; prompts stay left-padded and completions right-padded."""
    start = max(part.prompt_ids.shape[1] for part in parts)

    def left(values: list[Tensor]) -> Tensor:
        return torch.cat([pad(value, (start - value.shape[1], 0)) for value in values])

    return Sequences(
        left([part.prompt_ids for part in parts]),
        left([part.prompt_mask for part in parts]),
        join_columns([part.completion_ids for part in parts]),
        join_columns([part.completion_mask for part in parts]),
    )


def join_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """Put rollouts of the same number of samples per prompt below each other."""
    if len(parts) == 1:
        return parts[0]
    return Rollouts(
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        sequences=join_sequences([part.sequences for part in parts]),
        completions=tuple(completion for part in parts for completion in part.completions),
        sampling_logprobs=join_columns([part.sampling_logprobs for part in parts]),
        finished=torch.cat([part.finished for part in parts]),
        samples_per_prompt=parts[0].samples_per_prompt,
    )


def join_rewards(parts: Sequence[Rewards]) -> Rewards:
    """Put rewards below each other."""
    return replace(
        parts[0],
        total=torch.cat([part.total for part in parts]),
        correct=torch.cat([part.correct for part in parts]),
        parts={name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts},
    )
