"""Position codec for patches that uses the exponents of the base.

A step that is too small to change a large weight changes a small one, so the density depends on the exponent. The
elements of the base, known to writer and reader, are sorted by exponent, and each exponent is a cell.

Stream: the cells, in order of increasing exponent.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..dtypes import BitArray, DType
from ..errors import StreamError
from ..sparse import Indices, true_positions
from .cells import decode_cells, encode_cells
from .contract import Frame
from .numbers import MOST

CLASSES = 24


def exponent_classes(base: BitArray, dtype: DType) -> npt.NDArray[np.uint8]:
    """Compute the exponent class of each element.

    The class is the exponent counted down from the largest one, which has class CLASSES − 1. The lowest exponents share
    class 0. For a dtype without exponents all elements have the same class.

    Args:
        base: Carriers of the base [n].
        dtype: Dtype of the tensor.

    Returns:
        uint8 [n], from 0 to CLASSES − 1.
    """
    if dtype.mantissa is None:
        return np.zeros(len(base), np.uint8)
    values = 1 << 8 * dtype.itemsize - 1 - dtype.mantissa
    narrow = np.dtype(np.uint8 if values <= 256 else np.uint16)
    exponents = np.bitwise_and((base >> dtype.mantissa).astype(narrow), values - 1, dtype=narrow)
    lowest = narrow.type(max(0, int(exponents.max(initial=0)) - (CLASSES - 1)))
    return (np.maximum(exponents, lowest) - lowest).astype(np.uint8)


class Exponents:
    """The `exponents` position codec. It needs the base."""

    name = "exponents"

    def encode(self, indices: Indices, frame: Frame) -> bytes | None:
        if frame.base is None or frame.dtype.mantissa is None or len(indices) > MOST or frame.size >= 1 << 32:
            return None
        classes = exponent_classes(frame.base, frame.dtype)
        sizes = np.bincount(classes, minlength=CLASSES)
        has_entry = np.zeros(frame.size, bool)
        has_entry[indices] = True
        sorted_places = true_positions(has_entry.take(np.argsort(classes, kind="stable")))
        starts = np.cumsum(sizes) - sizes
        cells = np.repeat(np.arange(CLASSES), np.bincount(classes[indices], minlength=CLASSES))
        return encode_cells(sorted_places - starts[cells], cells, sizes)

    def decode(self, data: memoryview, count: int, frame: Frame) -> Indices:
        if frame.base is None:
            raise StreamError("the positions can be read only with the base")
        classes = exponent_classes(frame.base, frame.dtype)
        sizes = np.bincount(classes, minlength=CLASSES)
        places, cells = decode_cells(data, count, sizes)
        starts = np.cumsum(sizes) - sizes
        order = np.argsort(classes, kind="stable")
        indices: Indices = np.sort(order[places + starts[cells]])
        return indices
