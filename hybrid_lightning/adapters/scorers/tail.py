"""Tail scores: the gradient energy that LoRA of rank r cannot express.

T_r(G) = ||G||_F^2 - sum_{i<=r} sigma_i(G)^2,    tau_r(G) = T_r(G) / ||G||_F^2

with G the gradient of the training objective at the start policy, averaged over calibration rollouts, and sigma_i its
singular values. A full-rank step along -G gains ||G||_F^2 to first order, the best step of rank r gains the sum of
the first r squares.
"""

from hybrid_lightning.adapters.scorers.base import Scorer
from hybrid_lightning.adapters.statistics import ModuleStatistics, require


class TailEnergy(Scorer):
    """T_r(G): what rank r leaves behind, in the unit in which modules compete under plain gradient descent."""

    concurrent = True

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        return require(statistics.gradient, "the gradient", self).tail_energy(rank)


class TailFraction(Scorer):
    """tau_r(G), the tail as a share of the whole: scale-free, between 0 and 1; 0 for a zero gradient."""

    concurrent = True

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        gradient = require(statistics.gradient, "the gradient", self)
        energy = gradient.energy()
        return min(gradient.tail_energy(rank) / energy, 1.0) if energy > 0 else 0.0
