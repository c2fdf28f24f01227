"""Tail energy of the step that Adam would take, rather than of the gradient.

With v the mean over calibration micro-batches of the squared gradient (entry by entry),

P = G / (sqrt(v) + eps),    score = T_r(P) = ||P||_F^2 - sum_{i<=r} sigma_i(P)^2.
"""

from hybrid_lightning.adapters.scorers.base import Scorer
from hybrid_lightning.adapters.statistics import ExactGradient, ModuleStatistics, require
from hybrid_lightning.errors import ConfigError


class PreconditionedTail(Scorer):
    """T_r of the Adam-preconditioned gradient; needs whole gradients and 4 more bytes per candidate parameter.

    Args:
        eps: added to the root of the second moment, as in Adam.
    """

    needs_second_moment = True
    concurrent = True

    def __init__(self, eps: float = 1e-8) -> None:
        if not eps > 0:
            raise ConfigError(f"eps={eps}: must be positive, such as Adam's 1e-8.")
        self.eps = eps

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        gradient = require(statistics.gradient, "the gradient", self).matrix().double()
        second_moment = require(statistics.second_moment, "the second moment", self).to(gradient)
        return ExactGradient(gradient / (second_moment.sqrt() + self.eps)).tail_energy(rank)
