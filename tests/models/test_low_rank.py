"""The factors of a matrix are the best of their rank, and the same whatever the number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taskvec.models.low_rank import low_rank


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40), st.integers(0, 30), st.integers(0, 2**32 - 1))
def test_the_error_is_the_smallest_possible(rows: int, columns: int, rank: int, inner: int, seed: int) -> None:
    dice = np.random.default_rng(seed)
    matrix = (dice.standard_normal((rows, inner)) @ dice.standard_normal((inner, columns))).astype(np.float32)
    found = low_rank(matrix, rank)
    expected = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    norm = np.linalg.norm(expected)
    assert found.left.shape == (rows, found.rank)
    assert found.right.shape == (found.rank, columns)
    assert found.rank <= min(rank, rows, columns, inner)
    residual = np.linalg.norm(matrix - found.left.astype(np.float64) @ found.right.astype(np.float64))
    assert found.norm == pytest.approx(norm)
    assert found.residual == pytest.approx(residual, abs=1e-12 + 1e-9 * norm)
    assert residual <= np.linalg.norm(expected[rank:]) + 1e-6 * norm
    for k in range(found.rank):
        assert np.linalg.norm(found.left[:, k]) == pytest.approx(np.linalg.norm(found.right[k]), rel=1e-5)


def test_the_number_of_threads_does_not_matter() -> None:
    matrix = np.random.default_rng(0).standard_normal((600, 700)).astype(np.float32)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        factors = low_rank(matrix, 5)
        found.append((factors.left.tobytes(), factors.right.tobytes(), factors.residual))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert found[0] == found[1]


def test_a_matrix_of_zeros_has_no_factors() -> None:
    found = low_rank(np.zeros((3, 4), np.float32), 2)
    assert (found.rank, found.norm, found.residual) == (0, 0.0, 0.0)
