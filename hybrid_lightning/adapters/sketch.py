"""Gradients kept as sketches, so that a large model can be scored: O((m + n) k) numbers per module instead of m n.

Method: Tropp, Yurtsever, Udell and Cevher, "Practical sketching algorithms for low-rank matrix approximation" (SIAM
J. Matrix Anal. Appl. 2017, arXiv 1609.00048). With Gaussian test matrices Omega [n, k] and Psi [l, m] one keeps the
range sketch Y = G Omega and the co-range sketch W = Psi G; both are linear in G, so they add over micro-batches and
ranks. Then

    Q = orth(Y) [m, k],    X = pinv(Psi Q) W [k, n],    G ~ Q X.

What this file adds is a correction of the energies. Write G = Q Q'G + E, where E is what the range sketch missed. Psi
Q and Psi (1 - QQ') are independent Gaussians, hence

    X = Q'G + N with noise N of mean 0 and E[N N'] = ||E||_F^2 / (l - k - 1) * identity,
    E ||W - Psi Q X||_F^2 = (l - k) ||E||_F^2.

So R = ||W - Psi Q X||^2 / (l - k) estimates ||E||^2 without bias, ||X||^2 + R (1 - k / (l - k - 1)) estimates
||G||_F^2 without bias, and sigma_i(X)^2 - R / (l - k - 1) the leading squared singular values. With l = 2k + 1, as
here, the energy is simply ||X||^2.
"""

import hashlib
from functools import cached_property

import torch
from torch import Tensor

from hybrid_lightning.adapters.gradients import ExactForm, GradientForm, GradientMode
from hybrid_lightning.adapters.spectra import few_threads
from hybrid_lightning.adapters.statistics import Gradient, preconditioner
from hybrid_lightning.errors import ConfigError


class SketchedGradients(GradientMode):
    """Keep sketches; works with the scorers that need no more than energies and singular values.

    A module that is too small for a sketch to save memory is kept exactly.

    Args:
        size: k, the number of directions of the range sketch, above the LoRA rank; None takes 2 * rank + 10.
        seed: of the test matrices. They are drawn on the gradient's device, and are the same for all ranks and
            micro-batches.
    """

    def __init__(self, size: int | None = None, seed: int = 0) -> None:
        if size is not None and size < 1:
            raise ConfigError(f"size={size}: a sketch needs at least one direction; give None to choose it by the rank.")
        self.size, self.seed = size, seed

    def form(self, name: str, weight: Tensor, rank: int) -> GradientForm:  # noqa: D102
        size = 2 * rank + 10 if self.size is None else self.size
        if size <= rank:
            raise ConfigError(f"size={size}: a sketch must be larger than the LoRA rank {rank}; {2 * rank + 10} is good.")
        rows, columns = weight.shape
        if rows * size + (2 * size + 1) * columns >= rows * columns:
            return ExactForm((rows, columns), weight.device)
        return SketchForm(name, (rows, columns), weight.device, size, self.seed)


class SketchForm(GradientForm):
    """Range and co-range sketch of one module's gradient.

    The test matrices are drawn anew for each use: that costs little beside the products, and halves the memory.

    Args:
        name: of the module; gives each its own test matrices.
        shape: (m, n).
        device: of the gradient; the sketches stay there.
        size: k.
        seed: of the test matrices.
    """

    def __init__(self, name: str, shape: tuple[int, int], device: torch.device, size: int, seed: int) -> None:
        self._shape, self._device, self._size = shape, device, size
        self._seed = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")

    def zeros(self) -> tuple[Tensor, ...]:  # noqa: D102
        (rows, columns), size = self._shape, self._size
        return (
            torch.zeros(rows, size, device=self._device),
            torch.zeros(2 * size + 1, columns, device=self._device),
        )

    def compress(self, gradient: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        omega, psi = self._test_matrices()
        gradient = gradient.to(torch.float32)
        return gradient @ omega, psi @ gradient

    def estimate(self, kept: tuple[Tensor, ...]) -> Gradient:  # noqa: D102
        _, psi = self._test_matrices()
        size = self._size
        # small matrices: float64 on the CPU costs nothing and spares the inverse any doubt
        y, w, psi = (tensor.to("cpu", torch.float64) for tensor in (*kept, psi))
        with few_threads(size):
            q = torch.linalg.qr(y).Q
            psi_q = psi @ q
            # Least squares; LAPACK's own routine for it gives other bits each time, by where its work space lies.
            basis, triangle = torch.linalg.qr(psi_q)
            x = torch.linalg.solve_triangular(triangle, basis.T @ w, upper=True)
        missed = float((w - psi_q @ x).square().sum()) / (size + 1)  # ||E||_F^2; l - k = k + 1
        # Energy of rows and of columns: that of Q X without its noise, and of what was missed the share that the sketches have.
        energy = x.square().sum()
        captured = (1 - missed / energy).clamp(min=0) if energy > 0 else energy
        rows = ((q @ (x @ x.T)) * q).sum(1) * captured + missed * _shares(y.square().sum(1))
        columns = x.square().sum(0) * captured + missed * _shares(w.square().sum(0))
        return SketchedGradient(q, x, missed, (rows / len(columns), columns / len(rows)))

    def _test_matrices(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self._device).manual_seed(self._seed)
        (rows, columns), size = self._shape, self._size
        omega = torch.randn(columns, size, generator=generator, device=self._device)
        return omega, torch.randn(2 * size + 1, rows, generator=generator, device=self._device)


def _shares(energies: Tensor) -> Tensor:
    return energies / energies.sum().clamp(min=torch.finfo(energies.dtype).tiny)


class SketchedGradient(Gradient):
    """What sketches tell of a gradient, G ~ Q X.

    Args:
        basis: Q, [m, k] float64.
        coefficients: X, [k, n] float64.
        missed: R, the estimate of ||E||_F^2, which is also the energy of the noise in X.
        moments: means of the squares of G's rows [m] and columns [n].
    """

    def __init__(self, basis: Tensor, coefficients: Tensor, missed: float, moments: tuple[Tensor, Tensor]) -> None:
        self.shape = (basis.shape[0], coefficients.shape[1])
        self._basis, self._coefficients, self._missed, self._moments = basis, coefficients, missed, moments

    def energy(self) -> float:  # noqa: D102
        return float(self._squares.sum())

    def spectrum(self) -> Tensor:  # noqa: D102
        return (self._squares - self._missed / len(self._coefficients)).clamp(min=0)

    def matrix(self) -> Tensor:  # noqa: D102
        raise ConfigError(
            "this scorer needs whole gradients, but only sketches were kept: score with ExactGradients, or choose a "
            "scorer such as PreconditionedTail that works on sketches."
        )

    def preconditioned(self) -> Gradient:
        """As the sketches tell it; what they missed, and their noise, are taken to be spread over rows and columns as G is."""
        rows, columns = preconditioner(*self._moments)
        q, r = torch.linalg.qr(rows[:, None] * self._basis)
        mean = float(self._moments[0].mean())  # of the squares of all entries, which becomes 1
        missed = self._missed / mean if mean > 0 else 0.0
        even = (torch.ones_like(rows), torch.ones_like(columns))
        return SketchedGradient(q, r @ self._coefficients * columns, missed, even)

    @cached_property
    def _squares(self) -> Tensor:
        with few_threads(len(self._coefficients)):
            return torch.linalg.svdvals(self._coefficients).square()
