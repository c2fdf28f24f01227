"""Signal in the tail, against the sampling noise of the calibration rollouts.

Noise looks full-rank, so a raw tail energy counts it as need for full training. Let G be the mean gradient and D the
difference of the means of even and odd micro-batches, scaled (by 1/2, if there are as many of each) so that it has
the noise of G and none of its signal. Then T_r(D) says how much of T_r(G) noise alone would make, and

score = max(T_r(G) - T_r(D), 0) / (T_r(G) + T_r(D)),

which grows with the ratio of signal to noise x = T_r(G) / T_r(D) as (x - 1) / (x + 1), and stays finite without noise.
"""

from hybrid_lightning.adapters.scorers.base import Scorer
from hybrid_lightning.adapters.statistics import ModuleStatistics, require


class SpectrumSNR(Scorer):
    """Signal-to-noise score of the tail, between 0 (all noise) and 1 (none); needs at least two calibration losses."""

    needs_halves = True
    concurrent = True

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        whole = require(statistics.gradient, "the gradient", self).tail_energy(rank)
        noise = require(statistics.noise, "the split halves", self).tail_energy(rank)
        return max(whole - noise, 0.0) / (whole + noise) if whole + noise > 0 else 0.0
