"""Shares: what micro-batches and ranks add to the values of an optimizer step, and how they are joined.

A share's denominator is the whole step's, so that shares add up to the value, except metrics whose names end in "/max" or
"/min".
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hybrid_lightning.losses import functional as F
from hybrid_lightning.types import LossInputs


def share(values: Tensor, inputs: LossInputs) -> Tensor:
    """Share of these values in the optimizer step's mean, over tokens if they are [B, T], over sequences if they are [B].

    The mean is over the sequences that take part in the update, where some do not.
    """
    if values.dim() == 2:
        tokens = inputs.num_tokens if inputs.updated_tokens is None else inputs.updated_tokens
        return F.mean_over_tokens(values, inputs.completion_mask, tokens)
    return F.mean_over_sequences(values, inputs.num_sequences if inputs.updated_sequences is None else inputs.updated_sequences)


def largest(values: Tensor, inputs: LossInputs) -> Tensor:
    """Largest of these values, none of them negative, [B, T] or [B]; of no token at all 0, which never wins over another's."""
    return _used_or(0.0, values, inputs).max()


def smallest(values: Tensor, inputs: LossInputs) -> Tensor:
    """Smallest of these ratios or weights, [B, T] or [B]; of no token at all 1, where nothing differs."""
    lowest = _used_or(math.inf, values, inputs).min()
    return torch.where(lowest.isinf(), 1.0, lowest)


def _used_or(other: float, values: Tensor, inputs: LossInputs) -> Tensor:
    """Flat values, with `other` for padding or sequences without tokens, and once more at the end, so that one is there."""
    used = inputs.completion_mask if values.dim() == 2 else inputs.completion_mask.any(dim=1)
    return torch.cat([torch.where(used, values, other).flatten(), values.new_full((1,), other)])


def is_extreme(name: str) -> bool:
    """Whether of a metric of this name the largest or smallest counts, and not the sum."""
    return name.endswith(("/max", "/min"))


def join(name: str, one: Tensor, other: Tensor) -> Tensor:
    """Join two micro-batches' values of the metric `name`."""
    if is_extreme(name):
        return torch.maximum(one, other) if name.endswith("/max") else torch.minimum(one, other)
    return one + other


def combine_metrics(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the metrics of an optimizer step's micro-batches: extremes of names ending in "/max" or "/min", sums of all others.

    Args:
        parts: the `LossOutput.metrics` of each micro-batch, computed with the step's denominators.

    Returns:
        The metrics of all of them together, again a share if the step has more micro-batches.

    Example:
        >>> parts = [{"kl": torch.tensor(0.5), "ratio/max": torch.tensor(2.0)}, {"kl": torch.tensor(0.25)}]
        >>> {name: value.item() for name, value in combine_metrics(parts).items()}
        {'kl': 0.75, 'ratio/max': 2.0}
    """
    joined: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            joined[name] = join(name, joined[name], value) if name in joined else value
    return joined
