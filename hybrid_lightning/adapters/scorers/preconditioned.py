"""Tail energy of the step that Adam would take, rather than of the gradient.

Adam divides the gradient by the root of its second moment, which at its first step is the square of that gradient: a module's
step has the same size however large its gradient is, and what then counts is how many directions it takes. With a second moment
of rank one, as Adafactor keeps it (Shazeer and Stern 2018, arXiv 1804.04235), that step keeps how the entries compare: with r
the means of the squares of G's rows, c those of its columns and s the mean of all,

P = diag(r)^(-1/2) G diag(c)^(-1/2) s^(1/2),    score = T_r(P) = ||P||_F^2 - sum_{i<=r} sigma_i(P)^2.

It depends on the mean gradient alone, so that it is the same however the calibration rollouts are cut into micro-batches.
"""

from hybrid_lightning.adapters.scorers.base import Scorer
from hybrid_lightning.adapters.statistics import ModuleStatistics, require


class PreconditionedTail(Scorer):
    """T_r(P), the default: what rank r leaves behind of Adam's step; works on sketches, too."""

    concurrent = True

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        return require(statistics.gradient, "the gradient", self).preconditioned().tail_energy(rank)
