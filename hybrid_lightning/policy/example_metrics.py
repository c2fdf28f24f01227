"""`ExampleMetrics`: the terms of an `ExampleLoss` as means over held-out examples."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class ExampleMetrics(Metric):
    """Means over examples, each counted once by its index, however many ranks have seen it (see `CompletionMetrics`)."""

    full_state_update = False
    is_differentiable = False

    index: list[Tensor]
    rows: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names: list[str] = []  # of the columns behind the first, which is the weight
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, index: Tensor, weights: Tensor, terms: dict[str, Tensor]) -> None:
        """Add examples.

        Args:
            index: [E] int64, what identifies each.
            weights: [E], what each counts.
            terms: Name -> [E], what each adds; the same names every time.
        """
        self.names = list(terms)
        self.index.append(index.long())
        self.rows.append(torch.stack([weights.double(), *(value.double() for value in terms.values())], dim=1))

    def compute(self) -> dict[str, Tensor]:
        """Name -> sum of the terms / sum of the weights, float32; nothing if there was no example."""
        if len(self.index) == 0:  # a list, or a tensor once ranks have been gathered
            return {}
        index, rows = dim_zero_cat(self.index), dim_zero_cat(self.rows)
        _, inverse = index.unique(return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(index), device=index.device)
        first = first.scatter_reduce(0, inverse, torch.arange(len(index), device=index.device), "amin")
        weight, *terms = rows[first].sum(dim=0).unbind()
        return {name: (value / weight).float() for name, value in zip(self.names, terms, strict=True)}
