"""What a scorer may know about one candidate module, and the two forms in which its mean gradient comes.

Legend: a weight has m x n entries, G is the gradient of the calibration loss with respect to it, sigma_i(G) its
singular values in descending order. Orientation does not matter: every number here is the same for G and its
transpose.
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

KRYLOV_FROM = 1024  # rows (of the smaller side) from which a Krylov space is cheaper than all eigenvalues


class Gradient(ABC):
    """A mean gradient G of one weight, known exactly or through a sketch."""

    shape: tuple[int, int]  # (m, n)

    @abstractmethod
    def energy(self) -> float:
        """Squared Frobenius norm of G."""

    @abstractmethod
    def spectrum(self) -> Tensor:
        """Squared singular values of G, descending, float64; a sketch knows the leading ones only."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """G itself, [m, n].

        Raises:
            ConfigError: if only a sketch of G was kept.
        """

    @abstractmethod
    def preconditioned(self) -> "Gradient":
        """The direction of Adam's first step, by a second moment of rank one (see `scorers.preconditioned`)."""

    def tail_energy(self, rank: int) -> float:
        """The energy that no matrix of this rank can capture, T_r(G) = ||G||_F^2 - sum_{i<=r} sigma_i(G)^2.

        Args:
            rank: r, the LoRA rank.

        Returns:
            T_r(G), never negative, and exactly 0 where r >= min(m, n).
        """
        if rank >= min(self.shape):
            return 0.0
        return max(self.energy() - float(self.spectrum()[:rank].sum()), 0.0)


class ExactGradient(Gradient):
    """All entries of G.

    Args:
        matrix: G, [m, n], any floating dtype.
    """

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
        tail = krylov_tail_energy(self._matrix, rank) if min(self.shape) >= KRYLOV_FROM else None
        # summed from the far end rather than subtracted: no cancellation where nearly all energy is in the first values
        return float(self.spectrum()[rank:].sum()) if tail is None else tail


def preconditioner(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """What rows and columns are multiplied by, so that each entry is divided by the root of its second moment.

    Args:
        rows: means of the squares of each row, [m] float64.
        columns: of each column, [n].

    Returns:
        Factors [m] and [n]; zero where the moment is, as all entries are there.
    """

    def inverse_root(moments: Tensor) -> Tensor:
        return torch.where(moments > 0, moments.rsqrt(), 0.0)

    return inverse_root(rows) * rows.mean().sqrt(), inverse_root(columns)


@dataclass(frozen=True)
class ModuleStatistics:
    """All that a scorer may look at; what it did not ask for (see `Scorer`) is None."""

    name: str  # full dotted name of the module
    weight: Tensor  # [m, n], the model's own storage, detached
    parameters: int  # entries of weight and bias
    gradient: Gradient | None = None  # mean over the calibration losses
    noise: Gradient | None = None  # difference of the mean gradients of even and odd losses, scaled to the noise in `gradient`
    evaluate_loss: Callable[[], float] | None = None  # calibration loss of the model with its weights as they are now


def require(value: T | None, what: str, scorer: object) -> T:
    """Give `value`, or say that the scorer did not get what it declared.

    Raises:
        ConfigError: if the value is None.
    """
    if value is None:
        raise ConfigError(f"{type(scorer).__name__} needs {what}: give it to score_modules, or choose another scorer.")
    return value
