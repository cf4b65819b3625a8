"""Tensors whose rows come from several models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from taskvec_formats import Checkpoint, Form
from taskvec_formats.dtypes import BitArray, DType

from ..applying.rounding import round_to

Rows = npt.NDArray[np.int64]
ZERO, MEAN = -1, -2  # instead of the index of a model: rows of zeros, or the mean of the models with the token


class RowReader:
    """Reads rows of a tensor as values of a dtype."""

    def __init__(self, checkpoint: Checkpoint, name: str, dtype: DType) -> None:
        self._checkpoint, self._name, self._dtype = checkpoint, name, dtype
        form = checkpoint.tensors[name].form
        self._own = form.dtype
        self.width = form.size // form.shape[0] if form.shape[0] else 0

    def __call__(self, rows: Rows) -> npt.NDArray[Any]:
        """Return rows as values, [rows, width]. Consecutive rows are read at once."""
        width = self.width
        found = np.empty((len(rows), width), self._dtype.real)
        edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        for low, high in pairwise(edges):
            bits = self._checkpoint.bits(self._name, int(rows[low]) * width, (int(rows[high - 1]) + 1) * width)
            values = bits.view(self._own.real)
            if self._own != self._dtype:
                values = round_to(self._dtype, values.astype(self._own.compute), self._name)
            found[low:high] = values.reshape(-1, width)
        return found


class Gathered:
    """A tensor whose rows come from several models, read range by range.

    Args:
        form: Its dtype and shape.
        sources: The models.
        models: The index of the model of each row, ZERO or MEAN.
        rows: The row in that model.
        unused: The rows that belong to no token, which are the mean of all others.
        held: The row of each token in each model, or -1.
    """

    def __init__(
        self, form: Form, sources: Sequence[RowReader], models: Rows, rows: Rows, unused: Any, held: Rows
    ) -> None:
        self._form, self._sources, self._models, self._rows = form, sources, models, rows
        self._unused, self._held = unused, held

    def __call__(self, start: int, stop: int) -> BitArray:
        width = max(1, self._sources[0].width)
        first, end = start // width, -(-stop // width)
        found = self._values(np.arange(first, end))
        flat: BitArray = found.reshape(-1).view(self._form.dtype.carrier)
        return flat[start - first * width : stop - first * width]

    def _values(self, places: Rows) -> npt.NDArray[Any]:
        found = np.zeros((len(places), self._sources[0].width), self._form.dtype.real)
        for number, source in enumerate(self._sources):
            own = np.flatnonzero(self._models[places] == number)
            if len(own):
                found[own] = source(self._rows[places[own]])
        for place in np.flatnonzero(self._models[places] == MEAN):
            found[place] = self._mean_of_models(int(places[place]))
        spare = np.flatnonzero(self._unused[places])
        if len(spare):
            found[spare] = self._mean
        return found

    def _mean_of_models(self, row: int) -> npt.NDArray[Any]:
        having = [number for number in range(len(self._sources)) if self._held[number, row] >= 0]
        dtype = self._form.dtype
        total = np.zeros(self._sources[0].width, dtype.real)
        for number in having:
            own = self._sources[number](self._held[number, row : row + 1])[0]
            total = (total.astype(dtype.compute) + own.astype(dtype.compute)).astype(dtype.real)
        mean: npt.NDArray[Any] = (total.astype(dtype.compute) / np.float32(len(having))).astype(dtype.real)
        return mean

    @cached_property
    def _mean(self) -> npt.NDArray[Any]:
        """The mean of all rows of tokens, summed in f64."""
        used = np.flatnonzero(~self._unused)
        total = np.zeros(self._sources[0].width, np.float64)
        for low in range(0, len(used), 4096):
            total += self._values(used[low : low + 4096]).astype(np.float64).sum(axis=0)
        mean: npt.NDArray[Any] = (
            (total / max(1, len(used))).astype(self._form.dtype.compute).astype(self._form.dtype.real)
        )
        return mean
