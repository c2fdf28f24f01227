"""Tail energy of the step that Adam would take, rather than of the gradient.

Adam divides the gradient by the root of its second moment, entry by entry, so that a module's step has about the same size
however large its gradient is; what then counts is how many directions it takes. The second moment is kept as Adafactor does
(Shazeer and Stern 2018, arXiv 1804.04235): with r the means of its rows, c those of its columns and s the mean of all,

P = diag(r)^(-1/2) G diag(c)^(-1/2) s^(1/2),    score = T_r(P) = ||P||_F^2 - sum_{i<=r} sigma_i(P)^2.
"""

import torch
from torch import Tensor

from hybrid_lightning.adapters.scorers.base import Scorer
from hybrid_lightning.adapters.statistics import ModuleStatistics, require


class PreconditionedTail(Scorer):
    """T_r of the Adam-preconditioned gradient, the default; works on sketches too, with m + n numbers more for each module."""

    needs_second_moment = True
    concurrent = True

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        gradient = require(statistics.gradient, "the gradient", self)
        rows, columns = require(statistics.second_moment, "the second moment", self)
        return gradient.scaled(_inverse_root(rows) * rows.double().mean().sqrt(), _inverse_root(columns)).tail_energy(rank)


def _inverse_root(moments: Tensor) -> Tensor:
    """Zero where the moment is, as all gradients are there."""
    return torch.where(moments > 0, moments.double().rsqrt(), 0.0)
