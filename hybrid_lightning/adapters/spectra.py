"""Decompositions of gradients, in float64 and through the smaller Gram matrix: many times cheaper than a singular value
decomposition, and its rounding (1e-16 of the largest squared singular value) is far below that of a float32 gradient.

The tail energy of a large gradient without its whole spectrum: block Lanczos with a bound on the error.

With G [m, n], m <= n, and A = G G', a random orthonormal block X_1 [m, b] grows into the basis of a Krylov space

    Q = orth[X_1, A X_1, A^2 X_1, ...],    H = Q'A Q,

whose Ritz pairs (theta_i, v_i) approach the leading eigenpairs of A, the squared singular values of G, from below (Golub and
Underwood 1977; Golub and Van Loan, Matrix Computations, chapter 10). With residuals r_i = A v_i - theta_i v_i,

    0 <= sum_{i<=r} (lambda_i - theta_i) <= sum_{i<=r} ||r_i||^2 / gap,    gap = theta_r - (theta_{r+1} + ||r_{r+1}||),

if no eigenvalue of A on the complement of v_1..v_r lies above theta_{r+1} + ||r_{r+1}||. It could only if the start were almost
orthogonal to its eigenvector: for b = 24 Gaussian columns and m = 1024 the odds of an overlap below 1/1000 are under 1e-45. The
space grows until the bound is a 1e-8th of the tail; a spectrum that is too flat for that is left to the direct way.

Cost: 4 m n b per step, and 5 to 8 steps for gradients of language models, against 2 m^2 n for the Gram matrix and 4/3 m^3 for all
eigenvalues, most of it bound by memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ONE_THREAD_UP_TO = 2048  # rows from which several threads pay


@contextmanager
def few_threads(size: int) -> Iterator[None]:
    """Decompose small matrices on one thread.

    LAPACK's threads gain little there, and wait for each other at every step: on two cores that another process used as well,
    the eigenvalues of a 576 x 576 matrix took 12 s instead of 0.06 s.

    Args:
        size: rows of the matrix.
    """
    threads = torch.get_num_threads()
    if size <= ONE_THREAD_UP_TO:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def squared_singular_values(matrix: Tensor) -> Tensor:
    """All of them, [min(m, n)] float64, descending.

    Args:
        matrix: [m, n], any floating dtype.
    """
    gram = _lower_gram(matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T)
    with few_threads(len(gram)):
        return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)


def low_rank(matrix: Tensor, rank: int) -> Tensor:
    """Best approximation by a matrix of the given rank, [m, n] float64.

    Args:
        matrix: [m, n], any floating dtype.
        rank: at most min(m, n).
    """
    if matrix.shape[0] > matrix.shape[1]:
        return low_rank(matrix.T, rank).T
    matrix = matrix.double()
    with few_threads(len(matrix)):
        left = torch.linalg.eigh(_lower_gram(matrix)).eigenvectors[:, -rank:]  # the leading left singular vectors
    return left @ (left.T @ matrix)


def _lower_gram(matrix: Tensor) -> Tensor:
    """The lower triangle of G G', which is all that torch's symmetric decompositions read; above it zeros and leftovers."""
    gram = matrix.new_zeros(len(matrix), len(matrix))
    rows = -(-len(matrix) // 4)  # four blocks do 10 of 16 parts of the product
    for start in range(0, len(matrix), rows):
        block = slice(start, start + rows)
        gram[block, : start + rows] = matrix[block] @ matrix[: start + rows].T
    return gram


TOLERANCE = 1e-8  # bound on the error, relative to the tail energy
OVERSAMPLING = 8  # directions in a block beside the rank
FIRST_CHECK = 4  # steps before the first look at the Ritz values: fewer never sufficed
FEWEST_STEPS = 8  # the space must have room for as many, or the direct way is the better one


def krylov_tail_energy(matrix: Tensor, rank: int) -> float | None:
    """Energy beyond the leading singular values, or None where the space allowed does not reach the tolerance.

    The start is fixed, so that the same matrix always gives the same number.

    Args:
        matrix: G, [m, n], any floating dtype.
        rank: r, the number of leading singular values left out.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return krylov_tail_energy(matrix.T, rank)
    matrix = matrix.double()
    rows, width = len(matrix), rank + OVERSAMPLING
    energy = float(matrix.square().sum())
    steps = rows // (2 * width)
    if steps < FEWEST_STEPS or energy == 0:
        return None
    start = torch.randn(rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = torch.linalg.qr(start.to(matrix.device)).Q
    basis, images = block.new_empty(rows, steps * width), block.new_empty(rows, steps * width)  # Q and A Q
    for step in range(1, steps + 1):
        used = slice(0, step * width)
        basis[:, used.stop - width : used.stop] = block
        images[:, used.stop - width : used.stop] = following = matrix @ (matrix.T @ block)
        if step >= FIRST_CHECK:
            captured, bound = _ritz(basis[:, used], images[:, used], rank)
            tail = energy - captured
            if bound <= TOLERANCE * tail:
                return tail
        block = _orthogonalized(following, basis[:, used])
    return None


def _ritz(basis: Tensor, images: Tensor, rank: int) -> tuple[float, float]:
    """Sum of the leading Ritz values, and the bound on what it lacks (infinite without a gap)."""
    projected = (basis.T @ images).cpu()  # a small matrix, decomposed faster there
    with few_threads(len(projected)):
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    values, vectors = values.flip(0)[: rank + 1], vectors.flip(1)[:, : rank + 1].to(basis.device)
    residuals = (images @ vectors - basis @ (vectors * values.to(basis.device))).norm(dim=0).cpu()
    gap = float(values[rank - 1] - values[rank] - residuals[rank])
    bound = float(residuals[:rank].square().sum()) / gap if gap > 0 else float("inf")
    return float(values[:rank].sum()), bound


def _orthogonalized(block: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal columns, orthogonal to the basis too: done twice, which is enough also where little of the block is left."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block
