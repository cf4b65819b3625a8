"""Dtype and shape of a tensor, its blocks, and the conversion of a base tensor to another dtype or shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .dtypes import BitArray, DType
from .errors import HeaderError

BLOCK_ELEMENTS = 1 << 22
_ELEMENTS = 1 << 48  # positions are exact in all integer types used, and in f64


class Bits(Protocol):
    """The flat carriers of a tensor, available by slice: an array, or an object that reads them on request."""

    def __getitem__(self, span: slice, /) -> BitArray: ...


def check_shape(where: str, shape: Sequence[int]) -> None:
    """Check that a shape does not have too many dimensions or elements.

    Dimensions of zero are left out of the product, because numpy and safetensors multiply the other dimensions even
    then.

    Args:
        where: What the shape belongs to, for the error message.
        shape: The shape.

    Raises:
        HeaderError: There are more than 64 dimensions, or 2^48 or more elements.
    """
    if len(shape) > 64:
        raise HeaderError(f"{where} has {len(shape)} dimensions; at most 64 are read")
    elements = math.prod(filter(None, shape))
    if elements >= _ELEMENTS:
        raise HeaderError(f"{where} has {elements} elements, zero dimensions left out; fewer than 2^48 are read")


@dataclass(frozen=True)
class Form:
    """Dtype and shape of a tensor.

    Attributes:
        dtype: The dtype.
        shape: The shape.
    """

    dtype: DType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def cols(self) -> int:
        """Length of a row: the last dimension, or 1 for tensors with fewer than two dimensions."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def block_size(self) -> int:
        """Elements per block: as many whole rows as fit in BLOCK_ELEMENTS, at least one row."""
        return max(1, BLOCK_ELEMENTS // max(1, self.cols)) * self.cols

    @property
    def block_count(self) -> int:
        """Number of blocks, 0 for a tensor without elements."""
        return -(-self.size // self.block_size) if self.size else 0

    def block(self, number: int) -> tuple[int, int]:
        """Return the flat range [start, stop) of a block.

        Args:
            number: Number of the block.
        """
        start = number * self.block_size
        return start, min(start + self.block_size, self.size)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Return the flat ranges [start, stop) of all blocks, in order."""
        return map(self.block, range(self.block_count))

    def blocks_of(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Return the flat ranges of the blocks that overlap [start, stop), in order.

        Args:
            start: First element.
            stop: Element after the last one.
        """
        return map(self.block, self.numbers_of(start, stop))

    def numbers_of(self, start: int, stop: int) -> range:
        """Return the numbers of the blocks that overlap [start, stop).

        Args:
            start: First element.
            stop: Element after the last one.
        """
        if start >= stop:
            return range(0)
        return range(start // self.block_size, min(-(-stop // self.block_size), self.block_count))

    def __str__(self) -> str:
        return f"{self.dtype.name} {list(self.shape)}"


def take_for(bits: BitArray, origin: Form, form: Form) -> BitArray:
    """Convert a base tensor to the form of the tuned tensor.

    The result is what deltas refer to if dtype or shape changes (docs/format.md, section 6). Elements that exist in
    both shapes keep their value, rounded to the new dtype (by way of f32 if the new dtype is not F64). All other
    elements are zero bits: those that become NaN, because machines convert NaN differently, and all elements if the
    numbers of dimensions differ, or if the dtypes differ and one of them is not additive.

    Args:
        bits: Carriers of the base tensor.
        origin: Form of the base tensor.
        form: Form of the tuned tensor.

    Returns:
        Carriers [form.size].
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
