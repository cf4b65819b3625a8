"""A sparse tensor: the positions that carry something, and what they carry."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import StreamError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """Values at strictly increasing flat (row-major) positions of a tensor; every other position carries nothing.

    shape: the dense shape; () for a scalar, which has one position.
    indices: int64 [n], strictly increasing, each in [0, prod(shape)).
    values: [n], of any dtype of numbers, in the machine's byte order. An explicit zero is an entry like any other: a
        masked weight that never moved.

    The constructor copies both arrays, and what a tensor holds cannot be written to: nobody changes it afterwards.
    Raises StreamError where the indices are out of order or out of range, or the lengths differ, and for anything but
    arrays of these types.
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
        """From indices that were checked, or are taken in order from such: what is checked costs as much as a merge."""
        tensor = object.__new__(cls)
        tensor._hold(shape, indices, values)
        return tensor

    @classmethod
    def owning(cls, shape: tuple[int, ...], indices: Indices, values: npt.NDArray[Any]) -> SparseTensor:
        """The same as the constructor, without a copy: of arrays that nobody writes to any more."""
        _check(shape, indices, values)
        return cls._of_checked(shape, indices, values)

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> SparseTensor:
        """No entries: indices int64 [0], values of `dtype` [0]."""
        return cls._of_checked(shape, np.empty(0, np.int64), np.empty(0, dtype))

    @classmethod
    def concat(cls, parts: list[tuple[int, SparseTensor]], start: int, stop: int, dtype: npt.DTypeLike) -> SparseTensor:
        """The entries of the flat range [start, stop) from flat parts in order: (position of its first element, part).

        Between the parts, and where there are none, nothing is carried; values of `dtype`.
        """
        if len(parts) == 1 and (parts[0][0], parts[0][0] + parts[0][1].size) == (start, stop):
            return parts[0][1]
        indices = np.concatenate([np.empty(0, np.int64), *(first + part.indices for first, part in parts)])
        values = np.concatenate([np.empty(0, dtype), *(part.values for _, part in parts)])
        end = parts[-1][0] + parts[-1][1].size if parts else stop
        return cls.owning((end,), indices, values).slice_range(start, stop)

    def reshaped(self, shape: tuple[int, ...]) -> SparseTensor:
        """The same entries under another shape of the same size. Raises StreamError where that is too small."""
        if math.prod(shape) < self.size:
            return self.owning(shape, self.indices, self.values)
        return self._of_checked(shape, self.indices, self.values)

    def with_values(self, values: npt.NDArray[Any]) -> SparseTensor:
        """Other values, [n], copied, at the same positions. Raises StreamError where they are more or fewer."""
        return self._holding(_copy("values", values))

    def _holding(self, values: npt.NDArray[Any]) -> SparseTensor:
        """The same without a copy: of an array that nobody writes to any more."""
        _check_values(self.indices, values)
        return self._of_checked(self.shape, self.indices, values)

    def slice_range(self, start: int, stop: int) -> SparseTensor:
        """The entries of the flat range [start, stop), positions counted from its start."""
        if (start, stop) == (0, self.size):
            return self if len(self.shape) == 1 else self.reshaped((self.size,))
        low, high = np.searchsorted(self.indices, (start, stop))
        return self._of_checked((stop - start,), self.indices[low:high] - start, self.values[low:high])

    def take(self, places: npt.NDArray[np.integer[Any]]) -> SparseTensor:
        """Those entries that stand at some places of the list, increasing."""
        return self._of_checked(self.shape, self.indices[places], self.values[places])

    def at(self, positions: Indices) -> SparseTensor:
        """The entries at some positions, int64, increasing."""
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
    # codecs and arithmetic look at the bits of values
    dtype = array.dtype.newbyteorder("=") if what == "values" else array.dtype
    copy = np.array(array, dtype, order="C")
    # of an array that owns its memory the flag could be taken back
    copy.setflags(write=False)
    return copy


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A view that cannot be written to; the array itself may still be somebody else's."""
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
            raise StreamError(f"indices {indices[0]} to {indices[-1]} leave a tensor of {size} positions")
        if not bool(np.all(indices[1:] > indices[:-1])):
            raise StreamError("indices are not strictly increasing")


def _check_values(indices: Indices, values: npt.NDArray[Any]) -> None:
    if values.shape != indices.shape:
        raise StreamError(f"{len(indices)} indices but values of shape {list(values.shape)}")
