"""Vectors with deltas rounded to F16 or BF16, for merges that are computed in the dtype of the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from taskvec_formats import Change, SparseTensor
from taskvec_formats.dtypes import DType
from taskvec_formats.forms import Bits

from ..vectors.source import DeltaSource
from ..vectors.vector import TaskVector


def in_dtypes(vector: TaskVector, dtypes: Mapping[str, DType]) -> TaskVector:
    """Return a vector whose deltas are rounded, and which `merge` merges in the same dtypes.

    Args:
        vector: The vector.
        dtypes: Tensor name -> the dtype to which its deltas are rounded. Other tensors are unchanged.
    """
    header = replace(vector.header, tuned=None)
    return TaskVector(header, vector.specs.values(), _Rounded(vector, dtypes), vector.name, made_of=[vector])


def dtypes_of(vectors: Sequence[TaskVector]) -> dict[str, DType]:
    """Return the dtypes to which vectors were rounded: tensor name -> dtype."""
    sources = (vector.source for vector in vectors)
    return {name: dtype for each in sources if isinstance(each, _Rounded) for name, dtype in each.dtypes.items()}


class _Rounded(DeltaSource):
    """The Source of the rounded deltas of a vector."""

    def __init__(self, vector: TaskVector, dtypes: Mapping[str, DType]) -> None:
        self._vector = vector
        self.dtypes = dtypes
        self.by_range = vector.source.by_range
        self.inputs = vector.inputs

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        change, dtype = self._vector.change(name, start, stop), self.dtypes.get(name)
        if dtype is None:
            return change
        with np.errstate(all="ignore"):
            values = dtype.narrowed(change.delta.values)
        kept = values != 0
        return Change(SparseTensor(change.delta.shape, change.delta.indices[kept], values[kept]), change.replacements)
