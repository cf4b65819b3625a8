"""Several sparse tensors over the positions that any of them holds: where every merge computes.

Arithmetic is in f32, in the order of the tensors, as in the programs that people merge with: the same numbers come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from taskvec_formats import SparseTensor
from taskvec_formats.sparse import Indices

from ..errors import MergeError
from .positions import union

# of numpy; or of torch, on any device: what computes with them keeps to operators that both have
Array: TypeAlias = Any


@dataclass(frozen=True)
class Part:
    """One tensor of several.

    places: of its entries in the union, int64 [n], increasing. values: f32 [n]. weight: its factor.
    """

    places: Array
    values: Array
    weight: float


@dataclass(frozen=True)
class Aligned:
    """The entries of several tensors on one list of positions.

    shape: of the dense tensor. indices: int64 [u], the union, increasing. parts: one a tensor, in their order.
    """

    shape: tuple[int, ...]
    indices: Indices
    parts: list[Part]

    def zeros(self) -> Array:
        """f32 zeros over the union, [u]."""
        like = self.parts[0].values
        return like.new_zeros(len(self.indices)) if hasattr(like, "new_zeros") else np.zeros(len(self.indices), "<f4")

    def values(self, part: Part) -> Array:
        """The values of one tensor over the union, f32 [u]; zero where it holds nothing."""
        spread = self.zeros()
        spread[part.places] = part.values
        return spread

    def weighted(self, part: Part) -> Array:
        """The same times its weight, rounded to f32."""
        values = self.values(part)
        return values if part.weight == 1 else values * part.weight

    def total(self) -> Array:
        """Σ weightᵢ·valuesᵢ over the union, f32 [u], added in the order of the tensors."""
        total = self.weighted(self.parts[0])
        for part in self.parts[1:]:
            total += self.weighted(part)
        return total

    def count(self) -> Array:
        """How many tensors hold each position, f32 [u]."""
        count = self.zeros()
        for part in self.parts:
            count[part.places] += 1
        return count

    def result(self, values: Array, kept: Array | None = None) -> SparseTensor:
        """A tensor with values, f32 [u], at the positions that are kept, bool [u]; left out: those that are not zero.

        Raises MergeError where a value that is kept is not a finite number.
        """
        found, kept = _as_numpy(values), _as_numpy(values != 0 if kept is None else kept)
        indices = self.indices
        if not kept.all():
            found, indices = found[kept], indices[kept]
        if not np.isfinite(found).all():
            raise MergeError("a weighted sum leaves the range of f32")
        return SparseTensor.owning(self.shape, indices, found.astype("<f4", copy=False))


def align(
    tensors: Sequence[SparseTensor], weights: Sequence[float], convert: Callable[[Any], Array] = lambda array: array
) -> Aligned:
    """Put tensors of one shape side by side; O(entries) memory, whatever the dense size.

    convert: numpy arrays to those that are to be computed with, such as `lambda a: torch.from_numpy(a).cuda()`.
    """
    indices, places = union([tensor.indices for tensor in tensors], tensors[0].size)
    parts = [
        Part(convert(own), convert(tensor.values), weight)
        for own, tensor, weight in zip(places, tensors, weights, strict=True)
    ]
    return Aligned(tensors[0].shape, indices, parts)


@contextmanager
def merging(tensor: str) -> Iterator[None]:
    """Within the block a MergeError names the tensor, and numpy does not warn of what is refused by one."""
    try:
        with np.errstate(all="ignore"):
            yield
    except MergeError as error:
        raise MergeError(f"tensor {tensor!r}: {error}") from None


def _as_numpy(array: Array) -> Any:
    return array.cpu().numpy() if hasattr(array, "cpu") else array
