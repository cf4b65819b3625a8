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
    def empty(cls, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> SparseTensor:
        """No entries: indices int64 [0], values of `dtype` [0]."""
        return cls(shape, np.empty(0, np.int64), np.empty(0, dtype))

    @property
    def size(self) -> int:
        """Number of positions of the dense tensor."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.indices)
