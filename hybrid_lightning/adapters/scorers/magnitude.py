"""Scores that ignore rank: how large the gradient is, alone or with the weight. Baselines for the tail scores."""

from hybrid_lightning.adapters.scorers.base import Scorer
from hybrid_lightning.adapters.statistics import ModuleStatistics, require


class GradientNorm(Scorer):
    """||G||_F, the Frobenius norm of the mean gradient."""

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        return max(require(statistics.gradient, "the gradient", self).energy(), 0.0) ** 0.5


class WeightGradient(Scorer):
    """sum_ij |W_ij G_ij|: to first order, how much the loss moves if each weight is changed by its own size.

    The saliency known from pruning, summed over the module; needs whole gradients.
    """

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        gradient = require(statistics.gradient, "the gradient", self).matrix().double()
        return float((statistics.weight.to(gradient) * gradient).abs().sum())
