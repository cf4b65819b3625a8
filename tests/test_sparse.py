"""SparseTensor accepts strictly increasing positions inside its shape, and nothing else."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import entries, exact, sparse_tensors

from taskvec_formats import SparseTensor
from taskvec_formats.errors import StreamError

INT64 = np.int64


@given(sparse_tensors())
def test_every_subset_of_positions_is_a_tensor(tensor: SparseTensor) -> None:
    assert len(tensor) == len(tensor.indices) == len(tensor.values) <= tensor.size == np.zeros(tensor.shape).size


@pytest.mark.parametrize(
    ("shape", "indices", "values", "message"),
    [
        ((4,), np.array([1, 1]), np.zeros(2), "not strictly increasing"),
        ((4,), np.array([2, 1]), np.zeros(2), "not strictly increasing"),
        ((4,), np.array([0, 3, 2]), np.zeros(3), "not strictly increasing"),
        ((4,), np.array([-1]), np.zeros(1), "-1 to -1 leave a tensor of 4"),
        ((4,), np.array([4]), np.zeros(1), "4 to 4 leave a tensor of 4"),
        ((), np.array([1]), np.zeros(1), "leave a tensor of 1"),
        ((0, 3), np.array([0]), np.zeros(1), "leave a tensor of 0"),
        ((4,), np.array([0, 1]), np.zeros(1), "2 indices but values of shape"),
        ((4,), np.array([0]), np.zeros((1, 1)), "1 indices but values of shape"),
        ((4,), np.array([[0]]), np.zeros((1, 1)), "must be int64"),
        ((4,), np.array([0], np.int32), np.zeros(1), "must be int64"),
        ((4,), np.array([0], np.uint64), np.zeros(1), "must be int64"),
        ((4,), np.array([0.0]), np.zeros(1), "must be int64"),
    ],
)
def test_other_indices_are_refused(shape: tuple[int, ...], indices: Any, values: Any, message: str) -> None:
    with pytest.raises(StreamError, match=message):
        SparseTensor(shape, indices, values)


def test_a_scalar_has_one_position() -> None:
    assert SparseTensor((), np.array([0]), np.ones(1, np.float32)).size == 1


def test_an_explicit_zero_is_an_entry() -> None:
    assert len(SparseTensor((3,), np.array([1]), np.zeros(1, np.float32))) == 1


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 2)])
def test_empty_has_the_shape_and_no_entries(shape: tuple[int, ...]) -> None:
    empty = SparseTensor.empty(shape, np.uint16)
    assert (empty.shape, len(empty), empty.indices.dtype, empty.values.dtype) == (shape, 0, INT64, np.uint16)


def test_a_tensor_cannot_be_changed_after_it_was_checked() -> None:
    tensor = SparseTensor((3,), np.array([0, 2]), np.ones(2, np.float32))
    with pytest.raises(ValueError, match="read-only"):
        tensor.indices[0] = 5
    with pytest.raises(ValueError, match="read-only"):
        tensor.values[0] = 5
    with pytest.raises(FrozenInstanceError):
        tensor.shape = (1,)


@given(sparse_tensors(), st.data())
def test_a_range_holds_its_entries_counted_from_its_start(tensor: SparseTensor, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, tensor.size))
    stop = data.draw(st.integers(start, tensor.size))
    part = tensor.within(start, stop)
    assert part.shape == (stop - start,)
    assert entries(part) == {place - start: v for place, v in entries(tensor).items() if start <= place < stop}
    assert part.values.dtype == tensor.values.dtype


@given(sparse_tensors(), st.data())
def test_the_entries_at_some_positions(tensor: SparseTensor, data: st.DataObject) -> None:
    wanted = sorted(data.draw(st.sets(st.integers(0, max(0, tensor.size - 1)))))
    kept = tensor.at(np.array(wanted, INT64))
    assert kept.shape == tensor.shape
    assert entries(kept) == {place: v for place, v in entries(tensor).items() if place in wanted}


@given(sparse_tensors())
def test_another_shape_of_the_same_size_holds_the_same_entries(tensor: SparseTensor) -> None:
    flat = tensor.reshaped((tensor.size,))
    assert flat.shape == (tensor.size,)
    assert exact(flat.reshaped(tensor.shape)) == exact(tensor)


def test_a_shape_too_small_is_refused() -> None:
    with pytest.raises(StreamError, match="leave a tensor of 3"):
        SparseTensor((4,), np.array([3]), np.ones(1)).reshaped((3,))
