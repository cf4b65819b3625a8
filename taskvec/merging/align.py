"""Several sparse tensors over the positions that any of them holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from taskvec_formats import SparseTensor
from taskvec_formats.sparse import Indices

from ..errors import MergeError
from ..positions import union

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Aligned:
    """Weighted values of several tensors on one list of positions.

    shape: of the dense tensor. indices: int64 [u], the union, increasing.
    parts: for each tensor its places in the union, int64 [n_i], and its values times its weight, f64 [n_i].
    """

    shape: tuple[int, ...]
    indices: Indices
    parts: list[tuple[Indices, Values]]

    def zeros(self) -> Values:
        """f64 zeros over the union, [u]."""
        return np.zeros(len(self.indices))

    def total(self) -> Values:
        """The sum of all parts over the union, [u], added in the order of the tensors."""
        total = self.zeros()
        for places, values in self.parts:
            total[places] += values
        return total

    def result(self, values: Values, kept: npt.NDArray[np.bool_]) -> SparseTensor:
        """The entries that are kept, rounded once to f32. Raises MergeError where one leaves its range."""
        with np.errstate(over="ignore"):
            rounded = values[kept].astype(np.float32)
        if not np.isfinite(rounded).all():
            raise MergeError("a weighted sum leaves the range of f32")
        return SparseTensor(self.shape, self.indices[kept], rounded)


def align(tensors: Sequence[SparseTensor], weights: Sequence[float]) -> Aligned:
    """Weigh and align; O(entries · log) time, O(entries) memory, whatever the dense size."""
    indices = union([tensor.indices for tensor in tensors])
    parts = [
        (np.searchsorted(indices, tensor.indices), tensor.values.astype(np.float64) * weight)
        for tensor, weight in zip(tensors, weights, strict=True)
    ]
    return Aligned(tensors[0].shape, indices, parts)
