"""A sparse tensor: the positions that carry something, and what they carry."""

from __future__ import annotations

import math
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
    values: [n], any dtype. An explicit zero is an entry like any other: a masked weight that never moved.

    Raises StreamError where the indices are out of order or out of range, or the lengths differ.
    """

    shape: tuple[int, ...]
    indices: Indices
    values: npt.NDArray[Any]

    def __post_init__(self) -> None:
        if self.indices.ndim != 1 or self.indices.dtype != np.int64:
            raise StreamError(f"indices must be int64 [n], found {self.indices.dtype} {list(self.indices.shape)}")
        if self.values.shape != self.indices.shape:
            raise StreamError(f"{len(self.indices)} indices but values of shape {list(self.values.shape)}")
        if len(self.indices):
            if self.indices[0] < 0 or self.indices[-1] >= self.size:
                raise StreamError(
                    f"indices {self.indices[0]} to {self.indices[-1]} leave a tensor of {self.size} positions"
                )
            if not bool(np.all(self.indices[1:] > self.indices[:-1])):
                raise StreamError("indices are not strictly increasing")
        self.indices.setflags(write=False)
        self.values.setflags(write=False)

    @classmethod
    def _of_checked(cls, shape: tuple[int, ...], indices: Indices, values: npt.NDArray[Any]) -> SparseTensor:
        """From indices that were checked, or are taken in order from such: what is checked costs as much as a merge."""
        tensor = object.__new__(cls)
        for name, part in (("shape", shape), ("indices", indices), ("values", values)):
            object.__setattr__(tensor, name, part)
        indices.setflags(write=False)
        values.setflags(write=False)
        return tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> SparseTensor:
        """No entries: indices int64 [0], values of `dtype` [0]."""
        return cls._of_checked(shape, np.empty(0, np.int64), np.empty(0, dtype))

    @classmethod
    def joined(cls, parts: list[tuple[int, SparseTensor]], start: int, stop: int, dtype: npt.DTypeLike) -> SparseTensor:
        """The entries of the flat range [start, stop) from flat parts in order: (position of its first element, part).

        Between the parts, and where there are none, nothing is carried; values of `dtype`.
        """
        if len(parts) == 1 and (parts[0][0], parts[0][0] + parts[0][1].size) == (start, stop):
            return parts[0][1]
        indices = np.concatenate([np.empty(0, np.int64), *(first + part.indices for first, part in parts)])
        values = np.concatenate([np.empty(0, dtype), *(part.values for _, part in parts)])
        end = parts[-1][0] + parts[-1][1].size if parts else stop
        return cls((end,), indices, values).within(start, stop)

    def reshaped(self, shape: tuple[int, ...]) -> SparseTensor:
        """The same entries under another shape of the same size. Raises StreamError where that is too small."""
        if math.prod(shape) < self.size:
            return SparseTensor(shape, self.indices, self.values)
        return self._of_checked(shape, self.indices, self.values)

    def holding(self, values: npt.NDArray[Any]) -> SparseTensor:
        """Other values, [n], at the same positions. Raises StreamError where they are more or fewer."""
        if values.shape != self.indices.shape:
            return SparseTensor(self.shape, self.indices, values)
        return self._of_checked(self.shape, self.indices, values)

    def within(self, start: int, stop: int) -> SparseTensor:
        """The entries of the flat range [start, stop), positions counted from its start."""
        if (start, stop) == (0, self.size):
            return self if len(self.shape) == 1 else self.reshaped((self.size,))
        low, high = np.searchsorted(self.indices, (start, stop))
        return self._of_checked((stop - start,), self.indices[low:high] - start, self.values[low:high])

    def taking(self, places: npt.NDArray[np.integer[Any]]) -> SparseTensor:
        """Those entries that stand at some places of the list, increasing."""
        return self._of_checked(self.shape, self.indices[places], self.values[places])

    def at(self, positions: Indices) -> SparseTensor:
        """The entries at some positions, int64, increasing."""
        return self.taking(np.flatnonzero(np.isin(self.indices, positions, assume_unique=True)))

    @property
    def size(self) -> int:
        """Number of positions of the dense tensor."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.indices)
