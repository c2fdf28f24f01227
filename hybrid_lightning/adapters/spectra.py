"""Decompositions of gradients, in float64 and through the smaller Gram matrix: many times cheaper than a singular value
decomposition, and its rounding (1e-16 of the largest squared singular value) is far below that of a float32 gradient.
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
