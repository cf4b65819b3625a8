"""Sparse tensors: values at some positions of a dense shape."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import StreamError

Indices = npt.NDArray[np.int64]


def true_positions(held: npt.NDArray[np.bool_]) -> Indices:
    """Return the positions of the true elements, as `np.flatnonzero` does.

    Args:
        held: bool [n].

    Returns:
        int64, increasing.
    """
    size = len(held)
    if not size // 40 < np.count_nonzero(held) <= size // 10:
        return np.flatnonzero(held)
    # numpy is three times as slow if somewhat less than a tenth is true
    padded = np.ones(size + size // 9 + 1, bool)
    padded[:size] = held
    found = np.flatnonzero(padded)
    return found[: len(found) - (len(padded) - size)]


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """Values at strictly increasing flat (row-major) positions of a tensor.

    The constructor copies both arrays. The arrays of a SparseTensor are read-only and never change.

    Attributes:
        shape: Dense shape; () for a scalar, which has one position.
        indices: int64 [n], strictly increasing, each in [0, prod(shape)).
        values: [n], of any numeric dtype, in the machine's byte order. An explicit zero is an entry, for example a
            masked weight that did not change.

    Raises:
        StreamError: The indices are not increasing or out of range, the lengths differ, or an argument is not of these
            types.
    """

    shape: tuple[int, ...]
    indices: Indices
    values: npt.NDArray[Any]

    def __post_init__(self) -> None:
        shape, indices, values = _shape(self.shape), _copy("indices", self.indices), _copy("values", self.values)
        _check(shape, indices, values)
        self._hold(shape, indices, values)

    def _hold(self, shape: tuple[int, ...], indices: Indices, values: npt.NDArray[Any]) -> None:
        for name, part in (("shape", shape), ("indices", _read_only(indices)), ("values", _read_only(values))):
            object.__setattr__(self, name, part)

    @classmethod
    def _of_checked(cls, shape: tuple[int, ...], indices: Indices, values: npt.NDArray[Any]) -> SparseTensor:
        """Create a tensor from indices known to be valid: checking them again would take as long as a merge."""
        tensor = object.__new__(cls)
        tensor._hold(shape, indices, values)
        return tensor

    @classmethod
    def owning(cls, shape: tuple[int, ...], indices: Indices, values: npt.NDArray[Any]) -> SparseTensor:
        """Create a tensor like the constructor, but without copying.

        Args:
            shape: Dense shape.
            indices: int64 [n]. The caller must not write to it afterwards.
            values: [n]. The caller must not write to it afterwards.

        Raises:
            StreamError: As for the constructor.
        """
        _check(shape, indices, values)
        return cls._of_checked(shape, indices, values)

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> SparseTensor:
        """Create a tensor without entries, with indices int64 [0] and values [0].

        Args:
            shape: Dense shape.
            dtype: Dtype of the values.
        """
        return cls._of_checked(shape, np.empty(0, np.int64), np.empty(0, dtype))

    @classmethod
    def concat(cls, parts: list[tuple[int, SparseTensor]], start: int, stop: int, dtype: npt.DTypeLike) -> SparseTensor:
        """Join flat parts and return the entries of the flat range [start, stop).

        Positions that no part covers have no entry.

        Args:
            parts: In order, the position of the first element of a part, and the part.
            start: First position of the range.
            stop: Position after the last one.
            dtype: Dtype of the values.

        Returns:
            The entries of the range. Positions count from `start`.
        """
        if len(parts) == 1 and (parts[0][0], parts[0][0] + parts[0][1].size) == (start, stop):
            return parts[0][1]
        indices = np.concatenate([np.empty(0, np.int64), *(first + part.indices for first, part in parts)])
        values = np.concatenate([np.empty(0, dtype), *(part.values for _, part in parts)])
        end = parts[-1][0] + parts[-1][1].size if parts else stop
        return cls.owning((end,), indices, values).slice_range(start, stop)

    def reshaped(self, shape: tuple[int, ...]) -> SparseTensor:
        """Return the same entries with another dense shape of the same size.

        Args:
            shape: The new shape.

        Raises:
            StreamError: An index is out of range for the new shape.
        """
        if math.prod(shape) < self.size:
            return self.owning(shape, self.indices, self.values)
        return self._of_checked(shape, self.indices, self.values)

    def with_values(self, values: npt.NDArray[Any]) -> SparseTensor:
        """Return a tensor with the same positions and other values.

        Args:
            values: [n], copied.

        Raises:
            StreamError: The number of values differs.
        """
        return self._holding(_copy("values", values))

    def _holding(self, values: npt.NDArray[Any]) -> SparseTensor:
        """Like `with_values`, but without a copy: `values` must not be written to afterwards."""
        _check_values(self.indices, values)
        return self._of_checked(self.shape, self.indices, values)

    def slice_range(self, start: int, stop: int) -> SparseTensor:
        """Return the entries of the flat range [start, stop) as a flat tensor whose positions count from `start`.

        Args:
            start: First position of the range.
            stop: Position after the last one.
        """
        if (start, stop) == (0, self.size):
            return self if len(self.shape) == 1 else self.reshaped((self.size,))
        low, high = np.searchsorted(self.indices, (start, stop))
        return self._of_checked((stop - start,), self.indices[low:high] - start, self.values[low:high])

    def take(self, places: npt.NDArray[np.integer[Any]]) -> SparseTensor:
        """Return the entries at the given places in the list of entries.

        Args:
            places: Increasing places, each in [0, n).
        """
        return self._of_checked(self.shape, self.indices[places], self.values[places])

    def at(self, positions: Indices) -> SparseTensor:
        """Return the entries at the given positions. Positions without an entry are ignored.

        Args:
            positions: int64, increasing.
        """
        return self.take(np.flatnonzero(np.isin(self.indices, positions, assume_unique=True)))

    @property
    def size(self) -> int:
        """Number of positions of the dense tensor."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.indices)


def _shape(shape: Any) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise StreamError(f"a shape is a list of whole numbers, found {shape!r:.80}") from None
    if any(size < 0 for size in sizes):
        raise StreamError(f"a shape has no negative sizes, found {list(sizes)!r:.80}")
    return sizes


def _copy(what: str, array: Any) -> npt.NDArray[Any]:
    if not isinstance(array, np.ndarray):
        raise StreamError(f"{what} must be a numpy array, found {type(array).__name__}")
    if array.dtype.kind in "OSUMm" or array.dtype.names:
        raise StreamError(f"{what} must be numbers, found {array.dtype}")
    # codecs and arithmetic use the bits of the values
    dtype = array.dtype.newbyteorder("=") if what == "values" else array.dtype
    copy = np.array(array, dtype, order="C")
    # a view of a read-only array cannot be made writable again (see `_read_only`)
    copy.setflags(write=False)
    return copy


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a read-only view; the array itself may still be writable elsewhere."""
    view = array.view()
    view.setflags(write=False)
    return view


def _check(shape: tuple[int, ...], indices: Indices, values: npt.NDArray[Any]) -> None:
    if indices.ndim != 1 or indices.dtype != np.int64:
        raise StreamError(f"indices must be int64 [n], found {indices.dtype} {list(indices.shape)}")
    _check_values(indices, values)
    size = math.prod(shape)
    if len(indices):
        if indices[0] < 0 or indices[-1] >= size:
            raise StreamError(f"indices {indices[0]} to {indices[-1]} are out of range for {size} positions")
        if not bool(np.all(indices[1:] > indices[:-1])):
            raise StreamError("indices are not strictly increasing")


def _check_values(indices: Indices, values: npt.NDArray[Any]) -> None:
    if values.shape != indices.shape:
        raise StreamError(f"{len(indices)} indices but values of shape {list(values.shape)}")
