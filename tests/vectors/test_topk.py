"""The k largest magnitudes over all tensors: exactly k, equal to a full sort, ties by position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from support import oracle

from taskvec.errors import MaskError, UsageError
from taskvec.vectors.topk import check_sparsity, entries_for, top_k

# few distinct magnitudes, so that most selections end inside a tie
TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-45, -1e-45, 1e-40, 3e38])
VALUES = TIED | oracle.F32_VALUES
DELTAS = st.lists(nps.arrays(np.float32, st.integers(0, 12), elements=TIED | VALUES), min_size=1, max_size=4)


def select(deltas: list[tuple[str, Any]], k: int) -> dict[str, list[int]]:
    chosen = top_k(lambda: deltas, k)
    return {name: chosen.indices(name, delta).tolist() for name, delta in deltas}


@given(DELTAS, st.data())
def test_the_selection_is_that_of_a_full_sort(arrays: list[Any], data: st.DataObject) -> None:
    deltas = [(f"tensor {i}", array) for i, array in enumerate(arrays)]
    changed = sum(int(np.count_nonzero(array)) for array in arrays)
    k = data.draw(st.integers(1, max(changed, 1)))
    if changed == 0:
        with pytest.raises(MaskError, match="only 0 weights changed"):
            top_k(lambda: deltas, k)
        return
    selection = select(deltas, k)
    assert selection == oracle.top_k(deltas, k)
    assert sum(map(len, selection.values())) == k


def test_magnitudes_that_differ_in_the_last_bit_are_told_apart() -> None:
    one = np.float32(1)
    assert select([("w", np.array([one, np.nextafter(one, 2), one], np.float32))], 1) == {"w": [1]}


def test_ties_go_to_the_earlier_tensor_and_the_earlier_position() -> None:
    deltas = [("a", np.array([0, -1, 1], np.float32)), ("b", np.array([1, 5, 1], np.float32))]
    assert select(deltas, 4) == {"a": [1, 2], "b": [0, 1]}


def test_nan_counts_as_larger_than_anything() -> None:
    assert select([("w", np.array([1, np.inf, np.nan], np.float32))], 1) == {"w": [2]}


def test_more_entries_than_changes_cannot_be_drawn() -> None:
    deltas = [("a", np.array([0, 1], np.float32)), ("b", np.zeros(0, np.float32)), ("c", np.ones(1, np.float32))]
    with pytest.raises(MaskError, match="3 entries are wanted but only 2 weights changed"):
        top_k(lambda: deltas, 3)


@pytest.mark.parametrize(
    ("sparsity", "eligible", "k"), [(0.9, 1000, 100), (0.99, 1000, 10), (0.9, 1004, 100), (0.9, 1006, 101), (0.1, 3, 3)]
)
def test_k_is_rounded_not_cut(sparsity: float, eligible: int, k: int) -> None:
    assert entries_for(sparsity, eligible) == k


@pytest.mark.parametrize(("sparsity", "eligible"), [(0.999, 100), (0.5, 0)])
def test_a_mask_of_nothing_is_refused(sparsity: float, eligible: int) -> None:
    with pytest.raises(MaskError, match=f"keeps none of {eligible}"):
        entries_for(sparsity, eligible)


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, float("nan"), float("inf")])
def test_a_sparsity_outside_the_open_interval_is_refused(sparsity: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        check_sparsity(sparsity)
    with pytest.raises(UsageError, match="between 0 and 1"):
        entries_for(sparsity, 100)
