"""Scorers: how sensitive a module is to being trained at low rank only. A scorer of your own is one more class.

The public text of Hybrid-LoRA (arXiv 2605.18822) gives the idea, a module's sensitivity to low-rank adaptation under a fixed
budget, but not the formula: the definitions below are this project's own. G is the gradient of the training objective at the
start policy, averaged over calibration rollouts, and sigma_i its singular values. To first order, a full-rank step along -G
gains ||G||_F^2, and the best step of rank r gains the sum of the first r sigma_i(G)^2.

- `TailEnergy` and `TailFraction`: the part of G that LoRA of rank r cannot express, T_r(G) = ||G||_F^2 - sum_{i<=r} sigma_i(G)^2,
  and its share tau_r(G) = T_r(G) / ||G||_F^2.
- `PreconditionedTail` (the default): the tail of Adam's step. Adam divides the gradient by the root of its second moment, so a
  module's step has the same size however large its gradient is, and the score measures how many directions the step needs. At the
  first step Adam's second moment is the squared gradient itself, which would leave only signs. A second moment of rank one, as in
  Adafactor (Shazeer and Stern 2018, arXiv 1804.04235), keeps the relative size of entries. With the mean squares u of G's rows
  and v of its columns, and the mean square s of all entries, P = diag(u)^(-1/2) G diag(v)^(-1/2) s^(1/2), and the score is
  T_r(P). It depends only on the mean gradient, so it is the same however the calibration rollouts are split into micro-batches.
- The experts of a layer are one module. Each expert's matrix has its own low rank, so their tails and energies are added up.
- `GradientNorm`: a baseline that ignores the rank. `Random`: chance, which every other scorer has to beat.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hybrid_lightning.adapters.gradients import Gradient
from hybrid_lightning.shared.configurable import Configurable

__all__ = ["GradientNorm", "PreconditionedTail", "Random", "Scorer", "TailEnergy", "TailFraction"]


@dataclass(frozen=True)
class ModuleStatistics:
    """What a scorer may know about one candidate module."""

    name: str  # full dotted name of the module
    weight: Tensor  # [m, n], detached; do not change it; for experts, their first parameter, [experts, m, n]
    parameters: int  # entries of weights and biases
    gradient: Gradient | None = None  # G, the mean over the calibration losses; None if the scorer does not need it


class Scorer(Configurable, ABC):
    """Turns the calibration statistics of one module into a number; modules with the highest scores are fully trained.

    To write your own scorer, subclass this and name the class by `class_path` in a config.

    Example:
        >>> class LargestSingularValue(Scorer):
        ...     def score(self, statistics: ModuleStatistics, rank: int) -> float:
        ...         return float(statistics.gradient.spectrum()[0])
    """

    needs_gradient: ClassVar[bool] = True  # reads `statistics.gradient`; if False there is no calibration pass
    concurrent: ClassVar[bool] = False  # `score` changes nothing, so it may run on several threads

    @abstractmethod
    def score(self, statistics: ModuleStatistics, rank: int) -> float:
        """Score one module.

        Args:
            statistics: What is known about that module.
            rank: LoRA rank r; 0 for a module that would have no LoRA.

        Returns:
            A finite number; higher is more sensitive to low-rank adaptation.
        """


class TailEnergy(Scorer):
    """Tail energy T_r(G): what rank r loses to first order, comparable between modules under plain gradient descent."""

    concurrent = True

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        return _gradient(statistics).tail_energy(rank)


class TailFraction(Scorer):
    """Tail fraction tau_r(G), the tail as a share of all energy: scale-free, between 0 and 1; 0 for a zero gradient."""

    concurrent = True

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        gradient = _gradient(statistics)
        energy = gradient.energy()
        return min(gradient.tail_energy(rank) / energy, 1.0) if energy > 0 else 0.0


class PreconditionedTail(Scorer):
    """Tail energy T_r(P) of Adam's step, the default; works with sketches too."""

    concurrent = True

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        return _gradient(statistics).preconditioned().tail_energy(rank)


class GradientNorm(Scorer):
    """Frobenius norm of the mean gradient, ||G||_F."""

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        return max(_gradient(statistics).energy(), 0.0) ** 0.5


class Random(Scorer):
    """Uniform random score between 0 and 1, determined by the seed and the module's name; needs no calibration.

    Args:
        seed: Another seed chooses other modules.
    """

    needs_gradient = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, statistics: ModuleStatistics, rank: int) -> float:  # noqa: D102
        digest = hashlib.sha256(f"{self.seed} {statistics.name}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48


def _gradient(statistics: ModuleStatistics) -> Gradient:
    assert statistics.gradient is not None, "`needs_gradient` is True, so there is a gradient"
    return statistics.gradient
