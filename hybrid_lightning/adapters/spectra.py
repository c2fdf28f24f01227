"""Singular values of gradients: all of them, or only the tail energy, in float64.

All singular values come from the smaller Gram matrix. That is many times cheaper than a singular value decomposition, and its
rounding error (1e-16 of the largest squared singular value) is far below the rounding error of a float32 gradient.

The tail energy of a large gradient does not need the whole spectrum, only its energy and the first r values. `krylov_tail_energy`
computes these by block Lanczos, with a bound on the error. With G [m, n], m <= n, and A = G G', a random orthonormal block X_1
[m, b] grows into the basis of a Krylov space

    Q = orth[X_1, A X_1, A^2 X_1, ...],    H = Q'A Q.

The Ritz pairs (theta_i, v_i) of H approach the leading eigenpairs of A, the squared singular values of G, from below (Golub and
Underwood 1977; Golub and Van Loan, Matrix Computations, chapter 10). With residuals r_i = A v_i - theta_i v_i,

    0 <= sum_{i<=r} (lambda_i - theta_i) <= sum_{i<=r} ||r_i||^2 / gap,    gap = theta_r - (theta_{r+1} + ||r_{r+1}||),

if no eigenvalue of A on the complement of v_1..v_r lies above theta_{r+1} + ||r_{r+1}||. One could lie there only if the random
start were almost orthogonal to its eigenvector: for b = 24 Gaussian columns and m = 1024 the probability of an overlap below
1/1000 is under 1e-45. The space grows until the bound is 1e-8 of the tail energy; where the spectrum is too flat for that, the
caller computes all eigenvalues.

Cost: 4 m n b per step, and 5 to 8 steps for gradients of language models, against 2 m^2 n for the Gram matrix and 4/3 m^3 for all
eigenvalues. Memory bandwidth bounds most of the eigenvalue computation.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

In = TypeVar("In")
Out = TypeVar("Out")
MAX_WORKERS = 16  # threads; each holds a float64 copy of its matrix
ONE_THREAD_UP_TO = 2048  # rows above which several threads pay off
KRYLOV_TOLERANCE = 1e-8  # largest bound on the error that is accepted, relative to the tail energy
KRYLOV_OVERSAMPLING = 8  # columns of a block (b) beyond the rank
KRYLOV_FIRST_CHECK = 4  # steps before the first Ritz values are computed: fewer never sufficed
KRYLOV_FEWEST_STEPS = 8  # if the matrix has no room for this many steps, all eigenvalues are computed instead


def squared_singular_values(matrix: Tensor) -> Tensor:
    """All squared singular values of a matrix [m, n] in descending order, [min(m, n)] float64."""
    gram = _lower_gram(matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T)
    with few_threads(len(gram)):
        return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)


def krylov_tail_energy(matrix: Tensor, rank: int) -> float | None:
    """Tail energy T_r(G) of G [m, n] without its r leading singular values, by block Lanczos (see the top of this file).

    None if the matrix is too small, or its spectrum too flat for the error to get below the tolerance. The random start is fixed,
    so that the same matrix always gives the same number.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return krylov_tail_energy(matrix.T, rank)
    matrix = matrix.double()
    rows, width = len(matrix), rank + KRYLOV_OVERSAMPLING
    energy = float(matrix.square().sum())
    steps = rows // (2 * width)
    if steps < KRYLOV_FEWEST_STEPS or energy == 0:
        return None
    start = torch.randn(rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = torch.linalg.qr(start.to(matrix.device)).Q
    basis, images = block.new_empty(rows, steps * width), block.new_empty(rows, steps * width)  # Q and A Q
    for step in range(1, steps + 1):
        used = slice(0, step * width)
        basis[:, used.stop - width : used.stop] = block
        images[:, used.stop - width : used.stop] = product = matrix @ (matrix.T @ block)
        if step >= KRYLOV_FIRST_CHECK:
            captured, bound = _ritz(basis[:, used], images[:, used], rank)
            tail = energy - captured
            if bound <= KRYLOV_TOLERANCE * tail:
                return tail
        block = product
        for _ in range(2):  # twice, so that it is orthonormal, and orthogonal to the basis, even where little is left of it
            block = torch.linalg.qr(block - basis[:, used] @ (basis[:, used].T @ block)).Q
    return None


@contextmanager
def few_threads(size: int) -> Iterator[None]:
    """Make torch use one thread within this context if the matrix to decompose has few rows (`size`).

    LAPACK's threads gain little on small matrices and wait for each other at every step: on two cores that another process used
    as well, the eigenvalues of a 576 x 576 matrix took 12 s instead of 0.06 s.
    """
    threads = torch.get_num_threads()
    if size <= ONE_THREAD_UP_TO:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def map_on_workers(function: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
    """Map a thread-safe function over items on all threads that torch may use; results keep the order of the items.

    Many small decompositions run faster side by side than one after another on LAPACK's own threads. Within the function torch
    uses one thread, so results do not depend on the number of threads. torch releases the interpreter's lock meanwhile. After the
    first error no further call is started.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, MAX_WORKERS), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)  # the workers have also set what later threads would start with


def _lower_gram(matrix: Tensor) -> Tensor:
    """G G' in its lower triangle, the only part that torch's symmetric decompositions read; the rest has no meaning."""
    gram = matrix.new_zeros(len(matrix), len(matrix))
    rows = -(-len(matrix) // 4)  # four blocks of rows: 10/16 of the full product's work
    for start in range(0, len(matrix), rows):
        block = slice(start, start + rows)
        gram[block, : start + rows] = matrix[block] @ matrix[: start + rows].T
    return gram


def _ritz(basis: Tensor, images: Tensor, rank: int) -> tuple[float, float]:
    """Sum of the `rank` leading Ritz values, and the bound on its error (infinite without a gap)."""
    projected = (basis.T @ images).cpu()  # a small matrix is decomposed faster on the CPU
    with few_threads(len(projected)):
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    values, vectors = values.flip(0)[: rank + 1], vectors.flip(1)[:, : rank + 1].to(basis.device)
    residuals = (images @ vectors - basis @ (vectors * values.to(basis.device))).norm(dim=0).cpu()
    gap = float(values[rank - 1] - values[rank] - residuals[rank])
    bound = float(residuals[:rank].square().sum()) / gap if gap > 0 else float("inf")
    return float(values[:rank].sum()), bound
