"""Mean gradients of the candidate modules: the values that scorers read, how much is kept, and how gradients are added up.

A `GradientMode` decides how much of each gradient is kept: all of it (`ExactGradients`, here) or a sketch (`SketchedGradients`,
in sketch.py). Both are linear functions of the gradient, so the gradients of micro-batches are added up in that form, module by
module (`GradientSum`), as soon as a backward pass has made them.

Legend: a weight is an m x n matrix, G the mean gradient of the calibration loss with respect to it, sigma_i(G) the singular
values of G in descending order. Every number here is the same for G and its transpose, so the orientation of a weight does not
matter.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hybrid_lightning.adapters.spectra import krylov_tail_energy, squared_singular_values
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.shared.configurable import Configurable

KRYLOV_FROM = 1024  # smallest min(m, n) for which block Lanczos is cheaper than computing all eigenvalues


def matrices_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a candidate by name: the three-dimensional parameters of experts, `weight` for other modules."""
    experts = {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3}
    return experts or {"weight": module.get_parameter("weight")}


class Gradient(ABC):
    """Mean gradient G of one weight, known exactly or through a sketch."""

    shape: tuple[int, int]  # (m, n)

    @abstractmethod
    def energy(self) -> float:
        """Squared Frobenius norm of G."""

    @abstractmethod
    def spectrum(self) -> Tensor:
        """Squared singular values of G in descending order, float64; from a sketch only the leading ones."""

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
    """Mean gradient with all its entries, [m, n] of any floating dtype."""

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


class GradientOfExperts(Gradient):
    """Mean gradients of the matrices of experts, as the blocks of one large matrix: energies and tails add up.

    Args:
        parts: Yields the gradient of each matrix, one in memory at a time.
    """

    def __init__(self, parts: Callable[[], Iterator[Gradient]]) -> None:
        self._parts = parts

    def energy(self) -> float:  # noqa: D102
        return sum(part.energy() for part in self._parts())

    def spectrum(self) -> Tensor:  # noqa: D102
        return torch.cat([part.spectrum() for part in self._parts()]).sort(descending=True).values

    def matrix(self) -> Tensor:  # noqa: D102
        raise ConfigError(
            "this scorer reads the matrix of a gradient, but each expert has its own; use a scorer such as PreconditionedTail "
            "that reads energies or singular values, or leave experts out of adapter.rank_pattern and adapter.target_modules"
        )

    def preconditioned(self) -> Gradient:  # noqa: D102
        return GradientOfExperts(lambda: (part.preconditioned() for part in self._parts()))

    def tail_energy(self, rank: int) -> float:  # noqa: D102
        return sum(part.tail_energy(rank) for part in self._parts())


def preconditioner(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the rows [m] and columns [n] of G that divide each entry by the root of its second moment of rank one.

    `rows` and `columns` are their mean squares, in float64; the factor of a row or column that is all zero is 0.
    """

    def inverse_root(moments: Tensor) -> Tensor:
        return torch.where(moments > 0, moments.rsqrt(), 0.0)

    return inverse_root(rows) * rows.mean().sqrt(), inverse_root(columns)


class GradientSum:
    """Sum of one module's gradients [m, n], as a few tensors that are a linear function of it; here as the whole gradient.

    Args:
        shape: (m, n).
        device: Where the sum is kept, in float32.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device | str) -> None:
        self.shape = shape
        self.sums: tuple[Tensor, ...] = (torch.zeros(shape, device=device),)

    def compress(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """Reduce a gradient [m, n] to the tensors that are kept; linear in the gradient."""
        return (gradient,)

    def estimate(self, kept: tuple[Tensor, ...]) -> Gradient:
        """Estimate a gradient from the tensors that were kept."""
        return ExactGradient(kept[0])

    def add(self, gradient: Tensor) -> None:
        """Add the gradient [m, n] of one loss."""
        for total, part in zip(self.sums, self.compress(gradient), strict=True):
            total.add_(part.to(total.device))

    def mean(self, losses: int) -> Gradient:
        """Mean gradient over this many losses; some of them may not have used the module."""
        return self.estimate(tuple(total * (1.0 / losses) for total in self.sums))

    @property
    def on_cpu(self) -> bool:
        """Whether the sums are in host memory."""
        return all(total.device.type == "cpu" for total in self.sums)

    def is_finite(self) -> bool:
        """Whether no gradient was infinite or nan."""
        return all(bool(torch.isfinite(total).all()) for total in self.sums)

    def is_zero(self) -> bool:
        """Whether the sum of all gradients is zero, for example because no loss used the module."""
        return not any(bool(total.any()) for total in self.sums)


class GradientMode(Configurable, ABC):
    """How much of each gradient is kept during calibration; a config chooses by class."""

    @abstractmethod
    def new_sum(self, name: str, weight: Tensor, rank: int) -> GradientSum:
        """An empty sum for the gradients of a weight [m, n] that is scored at this LoRA rank; rank 0 means without LoRA."""


class ExactGradients(GradientMode):
    """Keep whole gradients: 4 bytes per candidate parameter; every scorer works with them.

    Args:
        device: Where sums are kept and decomposed; the default leaves the accelerator's memory to the model.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def new_sum(self, name: str, weight: Tensor, rank: int) -> GradientSum:  # noqa: D102
        return GradientSum((weight.shape[0], weight.shape[1]), self.device)
