"""Shares: the contribution of a micro-batch on a rank to a value of the whole optimizer step, and how shares are joined.

The denominator of a share counts the whole step, so that the shares add up to the value. Metrics with names in "/max" or "/min"
are extremes instead, and are joined as extremes.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hybrid_lightning.losses import functional as F
from hybrid_lightning.types import LossInputs


def share(values: Tensor, inputs: LossInputs) -> Tensor:
    """Share of values in a mean over the optimizer step: over its tokens for [B, T], over its sequences for [B].

    If some sequences do not contribute to the update, the mean is over the ones that do.
    """
    if values.dim() == 2:
        tokens = inputs.num_tokens if inputs.updated_tokens is None else inputs.updated_tokens
        return F.mean_over_tokens(values, inputs.sampled_mask, tokens)
    sequences = inputs.num_sequences if inputs.updated_sequences is None else inputs.updated_sequences
    return F.mean_over_sequences(values, sequences, inputs.row_weights)


def largest(values: Tensor, inputs: LossInputs) -> Tensor:
    """Largest of values that are not negative, [B, T] or [B]; 0 if there is no token, which never exceeds another value."""
    return _used_or(0.0, values, inputs).max()


def smallest(values: Tensor, inputs: LossInputs) -> Tensor:
    """Smallest of ratios or weights, [B, T] or [B]; 1 if there is no token."""
    lowest = _used_or(math.inf, values, inputs).min()
    return torch.where(lowest.isinf(), 1.0, lowest)


def _used_or(other: float, values: Tensor, inputs: LossInputs) -> Tensor:
    """Flat values, with `other` for padding and for sequences without tokens, and once at the end so that it is never empty."""
    used = inputs.sampled_mask if values.dim() == 2 else inputs.sampled_mask.any(dim=1)
    return torch.cat([torch.where(used, values, other).flatten(), values.new_full((1,), other)])


def combine_metrics(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the metrics of several parts of an optimizer step: extremes for names in "/max" or "/min", sums for all others.

    The parts were computed with the step's denominators; if the step has more parts, the result is again a share.

    Example:
        >>> parts = [{"kl": torch.tensor(0.5), "ratio/max": torch.tensor(2.0)}, {"kl": torch.tensor(0.25)}]
        >>> {name: value.item() for name, value in combine_metrics(parts).items()}
        {'kl': 0.75, 'ratio/max': 2.0}
    """
    joined: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name not in joined:
                joined[name] = value
            elif is_extreme(name):
                joined[name] = (torch.maximum if name.endswith("/max") else torch.minimum)(joined[name], value)
            else:
                joined[name] = joined[name] + value
    return joined


def is_extreme(name: str) -> bool:
    """Whether the values of a metric with this name are joined by their largest or smallest instead of their sum."""
    return name.endswith(("/max", "/min"))
