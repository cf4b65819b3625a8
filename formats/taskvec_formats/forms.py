"""Dtype and shape of a tensor, its blocks, and what a base tensor of another form is taken for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .dtypes import BitArray, DType
from .errors import HeaderError

BLOCK_ELEMENTS = 1 << 22
_ELEMENTS = 1 << 48  # positions stay exact in every integer type used, and in f64


class Bits(Protocol):
    """The carriers of a tensor, flat, that are there or are read when a slice is taken: an array is one."""

    def __getitem__(self, span: slice, /) -> BitArray: ...


def check_shape(where: str, shape: Sequence[int]) -> None:
    """Raise HeaderError, naming `where`, for a shape of too many dimensions or elements.

    Dimensions of zero are left out of the product: numpy and safetensors multiply the others even then.
    """
    if len(shape) > 64:
        raise HeaderError(f"{where} has {len(shape)} dimensions where at most 64 are read")
    elements = math.prod(filter(None, shape))
    if elements >= _ELEMENTS:
        raise HeaderError(f"{where} has {elements} elements, zero dimensions left out; fewer than 2^48 are read")


@dataclass(frozen=True)
class Form:
    """Dtype and shape of a tensor."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def cols(self) -> int:
        """Length of a row: the last dimension, or 1 for tensors of fewer than two dimensions."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def block_size(self) -> int:
        """Elements of a block: as many whole rows as BLOCK_ELEMENTS hold, at least one."""
        return max(1, BLOCK_ELEMENTS // max(1, self.cols)) * self.cols

    @property
    def block_count(self) -> int:
        """Number of blocks; none where there are no elements."""
        return -(-self.size // self.block_size) if self.size else 0

    def block(self, number: int) -> tuple[int, int]:
        """Flat range [start, stop) of a block."""
        start = number * self.block_size
        return start, min(start + self.block_size, self.size)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Those of all blocks."""
        return map(self.block, range(self.block_count))

    def blocks_of(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Those of the blocks that hold an element of [start, stop)."""
        return map(self.block, self.numbers_of(start, stop))

    def numbers_of(self, start: int, stop: int) -> range:
        """The numbers of these blocks."""
        if start >= stop:
            return range(0)
        return range(start // self.block_size, min(-(-stop // self.block_size), self.block_count))

    def __str__(self) -> str:
        return f"{self.dtype.name} {list(self.shape)}"


def take_for(bits: BitArray, origin: Form, form: Form) -> BitArray:
    """A base tensor as the tuned one's form: what a changed dtype or shape is measured from, carriers [form.size].

    Elements that both shapes have keep their value, rounded to the new dtype (through f32 where it is narrower than
    that). All others are zero bits: NaN, which machines convert differently, and every element where the ranks differ
    or a dtype cannot be added.
    """
    taken: BitArray = np.zeros(form.size, form.dtype.carrier)
    same = origin.dtype == form.dtype
    if len(origin.shape) != len(form.shape) or not (same or (origin.dtype.additive and form.dtype.additive)):
        return taken
    corner = tuple(slice(min(old, new)) for old, new in zip(origin.shape, form.shape, strict=True))
    shared = bits.reshape(origin.shape)[corner]
    if not same:
        with np.errstate(all="ignore"):
            values = np.ascontiguousarray(shared).view(origin.dtype.real).astype(form.dtype.compute)
            rounded = values.astype(form.dtype.real)
        rounded[np.isnan(rounded)] = 0
        shared = rounded.view(form.dtype.carrier).reshape(shared.shape)
    taken.reshape(form.shape)[corner] = shared
    return taken
