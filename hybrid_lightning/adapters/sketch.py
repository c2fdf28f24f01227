"""Gradients kept as sketches, so that a large model can be scored: O((m + n) k) numbers per module instead of m n.

Method: Tropp, Yurtsever, Udell and Cevher, "Practical sketching algorithms for low-rank matrix approximation" (SIAM J. Matrix
Anal. Appl. 2017, arXiv 1609.00048). With Gaussian test matrices Omega [n, k] and Psi [l, m], the range sketch Y = G Omega and
the co-range sketch W = Psi G are kept; both are linear in G, so they add up over micro-batches and ranks. Then

    Q = orth(Y) [m, k],    X = pinv(Psi Q) W [k, n],    G ~ Q X.

This file adds a correction of the energies to the paper. Write G = Q Q'G + E: E is the part that the range sketch missed. Psi Q
and Psi (1 - QQ') are independent Gaussians, hence

    X = Q'G + N with noise N of mean 0 and E[N N'] = ||E||_F^2 / (l - k - 1) * identity,
    E ||W - Psi Q X||_F^2 = (l - k) ||E||_F^2.

So R = ||W - Psi Q X||_F^2 / (l - k) is an unbiased estimate of ||E||_F^2, and ||X||_F^2 + R (1 - k / (l - k - 1)) is an unbiased
estimate of ||G||_F^2. sigma_i(X)^2 - R / (l - k - 1) estimates the leading squared singular values. This file sets l = 2k + 1,
which makes the estimate of ||G||_F^2 simply ||X||_F^2.
"""

import hashlib
from functools import cached_property

import torch
from torch import Tensor

from hybrid_lightning.adapters.gradients import Gradient, GradientMode, GradientSum, preconditioner
from hybrid_lightning.adapters.spectra import few_threads
from hybrid_lightning.errors import ConfigError


class SketchedGradients(GradientMode):
    """Keep sketches of the gradients, for scorers that need only energies and singular values.

    The gradient of a module that is too small for a sketch to save memory is kept exactly.

    Args:
        size: Columns k of the range sketch, more than the LoRA rank; None takes 2 * rank + 10.
        seed: Seed of the test matrices, which are drawn on the CPU and are the same for all ranks, micro-batches and devices.
    """

    def __init__(self, size: int | None = None, seed: int = 0) -> None:
        if size is not None and size < 1:
            raise ConfigError(f"size={size}; give at least one direction, or None to choose it by the rank")
        self.size, self.seed = size, seed

    def new_sum(self, name: str, weight: Tensor, rank: int) -> GradientSum:  # noqa: D102
        size = 2 * rank + 10 if self.size is None else self.size
        if size <= rank:
            raise ConfigError(f"size={size} is not above the LoRA rank {rank}; {2 * rank + 10} is good")
        rows, columns = weight.shape
        if rows * size + (2 * size + 1) * columns >= rows * columns:
            return GradientSum((rows, columns), "cpu" if weight.device.type == "mps" else weight.device)  # these sums are float64
        return SketchedSum(name, (rows, columns), weight.device, size, self.seed)


class SketchedSum(GradientSum):
    """Keeps the range and co-range sketch of one module's gradient [m, n] on its device, with k columns (`size`).

    The seed and the module's name determine the test matrices. They are drawn again for each use: that costs little compared with
    the products, and halves the memory.
    """

    def __init__(self, name: str, shape: tuple[int, int], device: torch.device, size: int, seed: int) -> None:
        rows, columns = shape
        self.shape, self._device, self._size = shape, device, size
        self.sums = (torch.zeros(rows, size, device=device), torch.zeros(2 * size + 1, columns, device=device))
        self._seed = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")

    def compress(self, gradient: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        omega, psi = self._test_matrices()
        gradient = gradient.to(torch.float32)
        return gradient @ omega, psi @ gradient

    def estimate(self, kept: tuple[Tensor, ...]) -> Gradient:  # noqa: D102
        _, psi = self._test_matrices()
        size = self._size
        # The matrices are small: float64 on the CPU costs little, and leaves no doubt about the accuracy of the solution.
        y, w, psi = (tensor.to("cpu", torch.float64) for tensor in (*kept, psi))
        with few_threads(size):
            q = torch.linalg.qr(y).Q
            psi_q = psi @ q
            # Least squares by QR: LAPACK's own routine gives other bits from call to call, depending on where its work space
            # lies.
            basis, triangle = torch.linalg.qr(psi_q)
            x = torch.linalg.solve_triangular(triangle, basis.T @ w, upper=True)
        missed = float((w - psi_q @ x).square().sum()) / (size + 1)  # ||E||_F^2; l - k = k + 1
        # Energy of each row and column of G: the energy of Q X without its noise, plus a share of what was missed, which is
        # assumed to be distributed over rows as in Y and over columns as in W.
        energy = x.square().sum()
        captured = (1 - missed / energy).clamp(min=0) if energy > 0 else energy
        rows = ((q @ (x @ x.T)) * q).sum(1) * captured + missed * _shares(y.square().sum(1))
        columns = x.square().sum(0) * captured + missed * _shares(w.square().sum(0))
        return SketchedGradient(q, x, missed, (rows / len(columns), columns / len(rows)))

    def _test_matrices(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self._seed)  # on the CPU, so that they are the same for every device
        (rows, columns), size = self.shape, self._size
        omega = torch.randn(columns, size, generator=generator).to(self._device)
        return omega, torch.randn(2 * size + 1, rows, generator=generator).to(self._device)


def _shares(energies: Tensor) -> Tensor:
    return energies / energies.sum().clamp(min=torch.finfo(energies.dtype).tiny)


class SketchedGradient(Gradient):
    """Mean gradient known by its sketches only, G ~ Q X.

    Args:
        basis: Q, [m, k] float64.
        coefficients: X, [k, n] float64.
        missed: R, the estimate of ||E||_F^2; with l = 2k + 1 it is also the energy of the noise in X.
        moments: Mean squares of G's rows [m] and columns [n], float64.
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
            "this scorer needs whole gradients, but only sketches were kept; score with ExactGradients, or choose a "
            "scorer such as PreconditionedTail that works on sketches"
        )

    def preconditioned(self) -> Gradient:
        """P from Q X; the missed part and the noise are assumed to be spread over rows and columns like G itself."""
        rows, columns = preconditioner(*self._moments)
        q, r = torch.linalg.qr(rows[:, None] * self._basis)
        mean = float(self._moments[0].mean())  # mean square of all entries of G; in P it is 1
        missed = self._missed / mean if mean > 0 else 0.0
        even = (torch.ones_like(rows), torch.ones_like(columns))
        return SketchedGradient(q, r @ self._coefficients * columns, missed, even)

    @cached_property
    def _squares(self) -> Tensor:
        with few_threads(len(self._coefficients)):
            return torch.linalg.svdvals(self._coefficients).square()
