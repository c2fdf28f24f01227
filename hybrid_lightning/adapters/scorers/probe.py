"""A score that is measured, not derived: take both steps and see.

With t = step * ||W||_F / ||G||_F and G_r the best rank-r approximation of G (its truncated singular value
decomposition),

score = loss(W - t G_r) - loss(W - t G),

what the calibration loss gains if the step is not held to rank r. For small steps this is t T_r(G).
"""

import torch

from hybrid_lightning.adapters.scorers.base import Scorer
from hybrid_lightning.adapters.spectra import low_rank
from hybrid_lightning.adapters.statistics import ModuleStatistics, require
from hybrid_lightning.errors import ConfigError


class Probe(Scorer):
    """Measured gain of a full step over a rank-r step; two evaluations of the calibration loss per module.

    The weights are restored bit for bit. Needs whole gradients.

    Args:
        step: length of the full step, relative to the norm of the weight.
    """

    needs_loss = True

    def __init__(self, step: float = 0.01) -> None:
        if not step > 0:
            raise ConfigError(f"step={step}: must be positive, a fraction of the weight's norm such as 0.01.")
        self.step = step

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        gradient = require(statistics.gradient, "the gradient", self).matrix()
        evaluate_loss = require(statistics.evaluate_loss, "evaluate_loss", self)
        norm = float(gradient.double().norm())
        if norm == 0 or rank >= min(gradient.shape):
            return 0.0
        weight = statistics.weight
        length = self.step * float(weight.double().norm()) / norm
        start = weight.clone()
        losses = []
        with torch.no_grad():
            for direction in (low_rank(gradient, rank), gradient):
                try:
                    weight.copy_(start.double() - length * direction.to(start.device, torch.float64))
                    losses.append(float(evaluate_loss()))
                finally:
                    weight.copy_(start)
        return losses[0] - losses[1]
