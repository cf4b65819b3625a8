"""The best approximation of a matrix by two factors of low rank (Eckart and Young, 1936).

The singular vectors of the shorter side are the eigenvectors of the matrix times its transpose, computed in f64. The
whole matrix is held once, in f32. The result does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

_BLOCK = 1 << 22  # elements of a matrix that are converted to f64 at a time

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Factors:
    """Two matrices whose product approximates a third one.

    Attributes:
        left: f32 [m, r].
        right: f32 [r, n].
        norm: The Frobenius norm of the matrix.
        residual: The Frobenius norm of the matrix minus the product of these factors.
    """

    left: Matrix
    right: Matrix
    norm: float
    residual: float

    @property
    def rank(self) -> int:
        """The number of columns of `left`."""
        return int(self.left.shape[1])

    def product(self) -> Matrix:
        """The product of the factors, f32 [m, n], computed in f64 in blocks of rows."""
        found = np.empty((self.left.shape[0], self.right.shape[1]), np.float32)
        right = torch.from_numpy(self.right).double()
        rows = max(1, _BLOCK // max(1, right.shape[1]))
        with _one_thread():
            for start in range(0, len(found), rows):
                left = torch.from_numpy(self.left[start : start + rows]).double()
                torch.from_numpy(found[start : start + rows]).copy_(left @ right)
        return found


def low_rank(matrix: Matrix, rank: int) -> Factors:
    """Approximate a matrix by factors of at most a rank.

    Args:
        matrix: f32 [m, n].
        rank: The largest rank. It is lower for a matrix of lower rank: singular values below √(min(m, n) · 2⁻⁵²) times
            the largest one are not told from rounding.

    Returns:
        The factors. The k-th column of `left` and the k-th row of `right` have the same norm, √σ of the k-th largest
        singular value σ.
    """
    with _one_thread():
        return _factors(torch.from_numpy(matrix), rank)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: matrix libraries round differently for other numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _factors(matrix: torch.Tensor, rank: int) -> Factors:
    is_wide = matrix.shape[0] <= matrix.shape[1]
    tall = matrix.T if is_wide else matrix  # [long, short]
    short = tall.shape[1]
    gram = torch.zeros(short, short, dtype=torch.float64)
    for _, part in _parts(tall):
        gram.addmm_(part.T, part)
    squares, vectors = torch.linalg.eigh(gram)  # increasing
    del gram
    kept = min(rank, int((squares > squares[-1] * short * torch.finfo(torch.float64).eps).sum())) if short else 0
    basis = vectors[:, short - kept :].flip(1)
    # the sign of an eigenvector is arbitrary
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True)) if kept else basis
    basis = basis * torch.where(largest < 0, -1.0, 1.0)
    projected = torch.cat([torch.empty(0, kept, dtype=torch.float64), *(part @ basis for _, part in _parts(tall))])
    scale = projected.norm(dim=0).sqrt()
    long_factor, short_factor = (projected / scale).float(), (basis * scale).float()
    residual = norm = 0.0
    for start, part in _parts(tall):
        norm += float(part.square().sum())
        part -= long_factor[start : start + len(part)].double() @ short_factor.T.double()
        residual += float(part.square().sum())
    left, right = (short_factor, long_factor) if is_wide else (long_factor, short_factor)
    return Factors(left.numpy(), np.ascontiguousarray(right.T.numpy()), norm**0.5, residual**0.5)


def _parts(tall: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first row, rows in f64) of a matrix."""
    rows = max(1, _BLOCK // max(1, tall.shape[1]))
    for start in range(0, len(tall), rows):
        yield start, tall[start : start + rows].double()
