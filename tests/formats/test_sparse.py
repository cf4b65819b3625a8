"""SparseTensor accepts strictly increasing positions inside its shape, and nothing else."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.oracle import entries, exact, sparse_tensors

from taskvec_formats import SparseTensor
from taskvec_formats.errors import StreamError
from taskvec_formats.sparse import true_positions

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
        ((4,), np.array([-1]), np.zeros(1), "-1 to -1 are out of range for 4 positions"),
        ((4,), np.array([4]), np.zeros(1), "4 to 4 are out of range for 4 positions"),
        ((), np.array([1]), np.zeros(1), "are out of range for 1 positions"),
        ((0, 3), np.array([0]), np.zeros(1), "are out of range for 0 positions"),
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


@pytest.mark.parametrize(
    ("shape", "indices", "values", "message"),
    [
        ((4,), [0], np.ones(1), "indices must be a numpy array, found list"),
        ((4,), np.array([0]), [1.0], "values must be a numpy array, found list"),
        ((4,), np.array([0]), None, "values must be a numpy array, found NoneType"),
        ((4,), np.array([0]), np.array(["x"]), "values must be numbers, found <U1"),
        ((4,), np.array([0]), np.array([None]), "values must be numbers, found object"),
        ((4,), np.array([True]), np.ones(1), "indices must be int64"),
        ((4,), np.array([0], ">i8"), np.ones(1), "indices must be int64"),
        ((4,), np.array(0), np.ones(1), "indices must be int64"),
        (4, np.array([0]), np.ones(1), "a shape is a list of whole numbers, found 4"),
        ((4.0,), np.array([0]), np.ones(1), "a shape is a list of whole numbers"),
        ((-4, -1), np.array([0]), np.ones(1), r"a shape has no negative sizes, found \[-4, -1\]"),
        ("4", np.array([0]), np.ones(1), "a shape is a list of whole numbers"),
    ],
)
def test_what_is_not_of_the_types_is_refused(shape: Any, indices: Any, values: Any, message: str) -> None:
    with pytest.raises(StreamError, match=message):
        SparseTensor(shape, indices, values)


def test_the_arrays_given_stay_the_callers() -> None:
    """They can be written to afterwards, through whatever they are views of, and the tensor does not notice."""
    buffer, values = np.arange(8), np.ones(8, np.float32)
    views = buffer[1::2], values[::2]
    read_only = views[0].view(), views[1].view()
    for each in read_only:
        each.setflags(write=False)
    for pair in (views, read_only):
        tensor = SparseTensor((8,), *pair)
        held = tensor.with_values(pair[1])
        before = exact(tensor)
        buffer[:] = 0
        values[:] = 7
        assert exact(tensor) == exact(held) == before
        buffer[:], values[:] = np.arange(8), 1


def test_what_a_tensor_holds_cannot_be_made_writable() -> None:
    tensor = SparseTensor((3,), np.array([0, 2]), np.ones(2, np.float32))
    for array in (tensor.indices, tensor.values):
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.setflags(write=True)


@pytest.mark.parametrize("dtype", [">f4", ">u2", "<f8", "?"])
def test_values_are_kept_in_the_machines_byte_order(dtype: str) -> None:
    values = np.array([1, 0, 1], dtype)
    tensor = SparseTensor((3,), np.arange(3), values)
    assert tensor.values.tolist() == values.tolist()
    assert tensor.values.dtype.isnative


def test_sizes_of_numpy_make_a_shape() -> None:
    assert SparseTensor([np.int32(2), 3], np.array([5]), np.ones(1)).shape == (2, 3)  # type: ignore[arg-type]


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
    part = tensor.slice_range(start, stop)
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
    with pytest.raises(StreamError, match="are out of range for 3 positions"):
        SparseTensor((4,), np.array([3]), np.ones(1)).reshaped((3,))


@pytest.mark.parametrize("size", [0, 1, 7, 40, 1000, 100_000])
@pytest.mark.parametrize("density", [0, 0.01, 0.024, 0.03, 0.07, 0.1, 0.12, 1])
def test_true_positions_are_those_of_numpy(size: int, density: float) -> None:
    held = np.random.default_rng(size).random(size) < density
    found = true_positions(held)
    assert found.dtype == np.int64
    assert np.array_equal(found, np.flatnonzero(held))
