"""What a scorer may know about one candidate module: its weight, its mean gradient, and the gradient's noise.

The mean gradient is held exactly (`ExactGradient`, here) or as a sketch (`SketchedGradient`, in sketch.py).

Legend: a weight is an m x n matrix, G the mean gradient of the calibration loss with respect to it, sigma_i(G) the singular
values of G in descending order. Every number here is the same for G and its transpose, so the orientation of a weight does not
matter.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hybrid_lightning.adapters.spectra import krylov_tail_energy, squared_singular_values
from hybrid_lightning.errors import ConfigError

T = TypeVar("T")

KRYLOV_FROM = 1024  # min(m, n) from which block Lanczos is cheaper than computing all eigenvalues


class Gradient(ABC):
    """Mean gradient G of one weight, known exactly or through a sketch."""

    shape: tuple[int, int]  # (m, n)

    @abstractmethod
    def energy(self) -> float:
        """Squared Frobenius norm of G."""

    @abstractmethod
    def spectrum(self) -> Tensor:
        """Squared singular values of G in descending order, float64; of a sketch only the leading ones."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """G itself, [m, n]; ConfigError if only a sketch of G was kept."""

    @abstractmethod
    def preconditioned(self) -> "Gradient":
        """Adam's first step P for this gradient, with a second moment of rank one (see `PreconditionedTail` in scorers.py)."""

    def tail_energy(self, rank: int) -> float:
        """Energy that no matrix of this rank can capture, T_r(G) = ||G||_F^2 - sum_{i<=r} sigma_i(G)^2.

        Never negative, exactly 0 where r >= min(m, n), and the whole energy where r = 0.
        """
        if rank >= min(self.shape):
            return 0.0
        return max(self.energy() - float(self.spectrum()[:rank].sum()), 0.0)


class ExactGradient(Gradient):
    """Mean gradient of which all entries are kept, [m, n] of any floating dtype."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        self.shape = (matrix.shape[0], matrix.shape[1])

    def energy(self) -> float:  # noqa: D102
        return float(self._matrix.double().square().sum())

    def spectrum(self) -> Tensor:  # noqa: D102
        return squared_singular_values(self._matrix)

    def matrix(self) -> Tensor:  # noqa: D102
        return self._matrix

    def preconditioned(self) -> Gradient:  # noqa: D102
        matrix = self._matrix.double()
        rows, columns = preconditioner(matrix.square().mean(1), matrix.square().mean(0))
        return ExactGradient(rows[:, None] * matrix * columns)

    def tail_energy(self, rank: int) -> float:  # noqa: D102
        if rank >= min(self.shape):
            return 0.0
        if rank == 0:
            return self.energy()
        tail = krylov_tail_energy(self._matrix, rank) if min(self.shape) >= KRYLOV_FROM else None
        # The tail is summed, not subtracted from the total: no cancellation where nearly all energy is in the first values.
        return float(self.spectrum()[rank:].sum()) if tail is None else tail


def preconditioner(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the rows [m] and columns [n] of G that divide each entry by the root of its second moment of rank one.

    `rows` and `columns` are their mean squares, in float64; the factor of a row or column that is all zero is 0.
    """

    def inverse_root(moments: Tensor) -> Tensor:
        return torch.where(moments > 0, moments.rsqrt(), 0.0)

    return inverse_root(rows) * rows.mean().sqrt(), inverse_root(columns)


@dataclass(frozen=True)
class ModuleStatistics:
    """All that a scorer may look at; what the scorer did not ask for (see `Scorer`) is None."""

    name: str  # full dotted name of the module
    weight: Tensor  # [m, n], detached; shares memory with the model
    parameters: int  # entries of weight and bias
    gradient: Gradient | None = None  # G, the mean over the calibration losses
    noise: Gradient | None = None  # difference of the mean gradients of even and odd losses, scaled to the noise of `gradient`
    update: Gradient | None = None  # sum of the steps that the optimizer would make at the start policy (see updates.py)
    evaluate_loss: Callable[[], float] | None = None  # calibration loss at the model's current weights


def require(value: T | None, what: str, scorer: object) -> T:
    """`value`, which the scorer needs; ConfigError if it is None."""
    if value is None:
        raise ConfigError(f"{type(scorer).__name__} needs {what}; give `Scoring` what makes it, or choose another scorer")
    return value
