"""Alignment of several sparse tensors on the union of their positions, on which every merge method computes.

Arithmetic is in f32 and in the order of the tensors, as in other merging programs, so that the results are identical.
A merge of models in F16 or BF16 can round every intermediate result to their dtype, as torch does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from taskvec_formats import SparseTensor
from taskvec_formats.dtypes import DType
from taskvec_formats.sparse import Indices

from ..arguments import shown
from ..devices import device_of
from ..errors import MergeError
from .positions import union

# an array of numpy, or a tensor of torch on any device; code that uses it is limited to operators that both have
Array: TypeAlias = Any


@dataclass(frozen=True)
class Part:
    """The entries of one of several aligned tensors.

    Attributes:
        places: The indices of its entries in the union, int64 [n], increasing.
        values: The values of its entries, f32 [n].
        weight: Its factor.
    """

    places: Array
    values: Array
    weight: float


@dataclass(frozen=True)
class Aligned:
    """The entries of several tensors on one list of positions.

    Attributes:
        shape: The shape of the dense tensor.
        indices: The union of the positions, int64 [u], increasing.
        parts: One part per tensor, in the order of the tensors.
        method: The name of the registered merge method that computes on them, for errors. None stands for the sums and
            methods of this package.
        dtype: The dtype to which results of single operations are rounded. None leaves them in f32.
    """

    shape: tuple[int, ...]
    indices: Indices
    parts: list[Part]
    method: str | None = None
    dtype: DType | None = None

    def rounded(self, values: Array) -> Array:
        """Round values to `dtype`, to nearest with ties to even. The result is f32 too."""
        return values if self.dtype is None else self.dtype.narrowed(values)

    def factor(self, part: Part) -> float:
        """Return the weight of one tensor, rounded to `dtype`."""
        return part.weight if self.dtype is None else float(self.rounded(np.float32(part.weight)))

    def zeros(self) -> Array:
        """Return zeros over the union, f32 [u]."""
        like = self.parts[0].values
        return like.new_zeros(len(self.indices)) if hasattr(like, "new_zeros") else np.zeros(len(self.indices), "<f4")

    def number(self, value: float) -> Array:
        """Return a number as an array without axes, f32, for a division: CUDA multiplies by the inverse of a number."""
        like = self.parts[0].values
        return like.new_tensor(value) if hasattr(like, "new_tensor") else np.float32(value)

    def values(self, part: Part) -> Array:
        """Return the values of one tensor over the union, f32 [u]; zero where it has no entry."""
        spread = self.zeros()
        spread[part.places] = part.values
        return spread

    def on_cpu(self, part: Part) -> np.ndarray:
        """Return the values of one tensor over the union as an array of numpy, f32 [u]."""
        found: np.ndarray = _as_numpy(self.values(part))
        return found

    def weighted(self, part: Part) -> Array:
        """Return the values of one tensor over the union times its weight, rounded to f32 [u]."""
        values, factor = self.values(part), self.factor(part)
        return values if factor == 1 else self.rounded(values * factor)

    def total(self) -> Array:
        """Return Σ weightᵢ·valuesᵢ over the union, f32 [u], added in the order of the tensors and then rounded."""
        total = self.weighted(self.parts[0])
        for part in self.parts[1:]:
            total += self.weighted(part)
        return self.rounded(total)

    def count(self) -> Array:
        """Return the number of tensors that have an entry at each position, f32 [u]."""
        count = self.zeros()
        for part in self.parts:
            count[part.places] += 1
        return count

    def result(self, values: Array, kept: Array | None = None) -> SparseTensor:
        """Build a sparse tensor from values over the union.

        Args:
            values: The values, f32 [u].
            kept: The positions to keep, bool [u]. None keeps the positions with a non-zero value.

        Raises:
            MergeError: An argument is not such an array, or a kept value is not a finite number.
        """
        indices = self.indices
        found = self._f32("values", _as_numpy(values), (len(indices),))
        kept = found != 0 if kept is None else _as_numpy(kept)
        if not isinstance(kept, np.ndarray) or kept.dtype != bool or kept.shape != found.shape:
            raise self._refusal(f"kept must be bool {list(found.shape)}", kept)
        if not kept.all():
            found, indices = found[kept], indices[kept]
        self._check_finite(found)
        return SparseTensor.owning(self.shape, indices, found)

    def checked(self, found: object) -> SparseTensor:
        """Check the result of a merge method.

        Args:
            found: What the function of the method returned.

        Returns:
            The same tensor, with f32 values.

        Raises:
            MergeError: It is not a SparseTensor of this shape, or a value is not a finite number.
        """
        if not isinstance(found, SparseTensor):
            raise self._refusal("the result must be a SparseTensor, as vectors.result(…) returns", found)
        if found.shape != self.shape:
            raise self._error(f"the result must have the shape {list(self.shape)}, found {list(found.shape)}")
        values = self._f32("the values of the result", found.values, found.indices.shape)
        self._check_finite(values)
        return found if values is found.values else found.with_values(values)

    def _f32(self, what: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf" or values.shape != shape:
            raise self._refusal(f"{what} must be f32 {list(shape)}", values)
        return values.astype("<f4", copy=False)

    def _refusal(self, expected: str, found: object) -> MergeError:
        said = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else shown(found)
        return self._error(f"{expected}, found {said}")

    def _check_finite(self, values: np.ndarray) -> None:
        finite = np.isfinite(values)
        if finite.all():
            return
        if self.method is None:
            # the values and weights are finite, so the sum has overflowed
            raise MergeError("a weighted sum leaves the range of f32")
        count = finite.size - np.count_nonzero(finite)
        raise self._error(f"the result must be finite f32 numbers, found {count:,} that are NaN or infinite")

    def _error(self, text: str) -> MergeError:
        return MergeError(text if self.method is None else f"the method {self.method}: {text}")


def align(
    tensors: Sequence[SparseTensor],
    weights: Sequence[float],
    convert: Callable[[Any], Array] | None = None,
    *,
    method: str | None = None,
    dtype: DType | None = None,
) -> Aligned:
    """Align tensors of one shape on the union of their positions. Memory is O(entries), regardless of the dense size.

    Args:
        tensors: The tensors.
        weights: One factor per tensor.
        convert: Converts numpy arrays to the arrays to compute with, such as `tensors_on("cuda")`. None
            computes with numpy.
        method: The name of the registered merge method that computes on the result, for errors.
        dtype: The dtype to which results of single operations are rounded. None leaves them in f32.
    """
    indices, places = union([tensor.indices for tensor in tensors], tensors[0].size)
    parts = [
        Part(own, tensor.values, weight) if convert is None else Part(convert(own), convert(tensor.values), weight)
        for own, tensor, weight in zip(places, tensors, weights, strict=True)
    ]
    return Aligned(tensors[0].shape, indices, parts, method, dtype)


def tensors_on(device: str) -> Callable[[Any], Array]:
    """Return a function that copies numpy arrays to torch tensors on a device.

    Args:
        device: As in `device_of`.

    Raises:
        UsageError: There is no such device, or torch is not installed.
    """
    there = device_of(device)
    import torch

    return partial(torch.tensor, device=there)


@contextmanager
def merging(tensor: str) -> Iterator[None]:
    """Add the name of a tensor to every MergeError within a `with` block, and silence numpy's floating-point warnings.

    Args:
        tensor: The name of the tensor.

    Raises:
        MergeError: Replaces the MergeError of the block.
    """
    try:
        with np.errstate(all="ignore"):
            yield
    except MergeError as error:
        raise MergeError(f"tensor {tensor!r}: {error}") from None


def _as_numpy(array: Array) -> Any:
    if not hasattr(array, "detach"):
        return array
    array = array.detach().cpu()
    # numpy has no bfloat16
    return (array.float() if array.is_floating_point() else array).numpy()
