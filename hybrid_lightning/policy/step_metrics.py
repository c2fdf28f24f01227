"""Training metrics of an optimizer step, gathered over its micro-batches and over ranks."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hybrid_lightning.losses.shares import is_extreme, join_metric
from hybrid_lightning.sharding.ranks import gather_objects, largest_over_ranks, sum_over_ranks


class StepMetrics:
    """Adds shares and averages means over the micro-batches of one optimizer step.

    Lightning logs what the last micro-batch of a step reported; without this the others would not be seen.
    """

    def __init__(self) -> None:
        self._shares: dict[str, Tensor] = {}
        self._means: dict[str, Tensor] = {}
        self._extremes: dict[str, Tensor] = {}
        self._count = 0

    def update(self, shares: dict[str, Tensor], means: dict[str, Tensor], micro_batches: int) -> dict[str, Tensor]:
        """Add a micro-batch.

        Args:
            shares: Values that add up over micro-batches; of a name that ends in `/max` or `/min` the largest or smallest is
                kept.
            means: Values that are averaged.
            micro_batches: Micro-batches in a step; after that many the next call starts anew.

        Returns:
            The values of the step so far.
        """
        if self._count >= micro_batches:
            self._shares, self._means, self._extremes, self._count = {}, {}, {}, 0
        self._count += 1
        for name, value in shares.items():
            kept = self._extremes if is_extreme(name) else self._shares
            kept[name] = join_metric(name, kept[name], value) if name in kept else value
        for name, value in means.items():
            self._means[name] = self._means.get(name, torch.zeros_like(value)) + value
        return {**self._shares, **{name: value / self._count for name, value in self._means.items()}, **self._extremes}


def join_ranks(shares: Mapping[str, Tensor], runs: Sequence[int]) -> dict[str, Tensor]:
    """Join a micro-batch's shares over ranks: sums, and of a name that ends in `/max` or `/min` the largest or smallest.

    Args:
        shares: Of this rank, scalars on one device; at least one. A rank without runs may lack names that the others have.
        runs: Forward passes of each rank.

    Returns:
        The same on every rank; in a run of one rank, the shares as they are.
    """
    if len(runs) == 1:
        return dict(shares)
    names = list(shares)
    if 0 in runs and any(runs):  # all ranks have to reduce the same values
        whole = next(rank for rank, count in enumerate(runs) if count)
        names = gather_objects(names)[whole]
    some = next(iter(shares.values()))

    def value(name: str) -> Tensor:
        if name in shares:
            return shares[name].float()
        return torch.full((), -math.inf if name.endswith("/max") else math.inf if name.endswith("/min") else 0.0).to(some.device)

    result: dict[str, Tensor] = {}
    sums = [name for name in names if not is_extreme(name)]
    if sums:
        result |= zip(sums, sum_over_ranks(torch.stack([value(name) for name in sums])).unbind(), strict=True)
    extremes = [name for name in names if is_extreme(name)]
    if extremes:
        signs = torch.tensor([1.0 if name.endswith("/max") else -1.0 for name in extremes], device=some.device)
        largest = largest_over_ranks(torch.stack([value(name) for name in extremes]) * signs) * signs
        result |= zip(extremes, largest.unbind(), strict=True)
    return {name: result[name] for name in names}
