"""Positions in a patch, by the exponents of the base: a step too small for a large weight changes a small one.

The base's elements are sorted by exponent, which reader and writer both know; each exponent is a cell of one density.

Stream: the cells, from the smallest exponent up.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..dtypes import BitArray, DType
from ..errors import StreamError
from ..sparse import Indices
from .cells import decode_cells, encode_cells
from .contract import Frame
from .numbers import MOST

CLASSES = 24


def exponent_classes(base: BitArray, dtype: DType) -> npt.NDArray[np.uint8]:
    """The class of each element, 0 to CLASSES − 1: its exponent, counted down from the largest, the lowest in class 0.

    Elements of a dtype without exponents are all of one class.
    """
    if dtype.mantissa is None:
        return np.zeros(len(base), np.uint8)
    values = 1 << 8 * dtype.itemsize - 1 - dtype.mantissa
    narrow = np.dtype(np.uint8 if values <= 256 else np.uint16)
    exponents = np.bitwise_and((base >> dtype.mantissa).astype(narrow), values - 1, dtype=narrow)
    lowest = narrow.type(max(0, int(exponents.max(initial=0)) - (CLASSES - 1)))
    return (np.maximum(exponents, lowest) - lowest).astype(np.uint8)


class Exponents:
    """The `exponents` position codec; it needs the base."""

    name = "exponents"

    def encode(self, indices: Indices, frame: Frame) -> bytes | None:
        if frame.base is None or frame.dtype.mantissa is None or len(indices) > MOST or frame.size >= 1 << 32:
            return None
        classes = exponent_classes(frame.base, frame.dtype)
        sizes = np.bincount(classes, minlength=CLASSES)
        held = np.zeros(frame.size, bool)
        held[indices] = True
        sorted_places = np.flatnonzero(held.take(np.argsort(classes, kind="stable")))
        starts = np.cumsum(sizes) - sizes
        cells = np.repeat(np.arange(CLASSES), np.bincount(classes[indices], minlength=CLASSES))
        return encode_cells(sorted_places - starts[cells], cells, sizes)

    def decode(self, data: memoryview, count: int, frame: Frame) -> Indices:
        if frame.base is None:
            raise StreamError("the positions can be read beside the base only")
        classes = exponent_classes(frame.base, frame.dtype)
        sizes = np.bincount(classes, minlength=CLASSES)
        places, cells = decode_cells(data, count, sizes)
        starts = np.cumsum(sizes) - sizes
        order = np.argsort(classes, kind="stable")
        indices: Indices = np.sort(order[places + starts[cells]])
        return indices
