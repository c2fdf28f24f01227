"""Training metrics of an optimizer step, gathered over its micro-batches."""

import torch
from torch import Tensor

from hybrid_lightning.losses.base import is_extreme, join


class StepMetrics:
    """Adds shares and averages means over the micro-batches of one optimizer step.

    Lightning logs what the last micro-batch of a step reported; without this the others would not be seen.
    """

    def __init__(self) -> None:
        self._shares: dict[str, Tensor] = {}
        self._means: dict[str, Tensor] = {}
        self._extremes: dict[str, Tensor] = {}
        self._count = 0

    def update(self, shares: dict[str, Tensor], means: dict[str, Tensor], micro_batches: int, ranks: int) -> dict[str, Tensor]:
        """Add a micro-batch.

        Args:
            shares: Values that add up over micro-batches and ranks; of a name that ends in `/max` or `/min` the largest or
                smallest is kept.
            means: Values that are averaged.
            micro_batches: Micro-batches in a step; after that many the next call starts anew.
            ranks: Processes; shares are multiplied by it, since what is logged is averaged over processes.

        Returns:
            The values of the step so far.
        """
        if self._count >= micro_batches:
            self._shares, self._means, self._extremes, self._count = {}, {}, {}, 0
        self._count += 1
        for name, value in shares.items():
            kept = self._extremes if is_extreme(name) else self._shares
            kept[name] = join(name, kept[name], value) if name in kept else value
        for name, value in means.items():
            self._means[name] = self._means.get(name, torch.zeros_like(value)) + value
        return {
            **{name: value * ranks for name, value in self._shares.items()},
            **{name: value / self._count for name, value in self._means.items()},
            **self._extremes,
        }
