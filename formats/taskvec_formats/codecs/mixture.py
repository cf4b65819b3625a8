"""Encoding of numbers of several classes, each with its own distribution, with as few entropy coders as worthwhile.

The description of a distribution takes some forty bytes, so classes with similar distributions share one. If the
numbers of a class are large, their low bits are nearly uniform and are stored without compression.

Stream: for each class that occurs, 8 · shift + group; for each group, number >> shift of its classes in turn; the low
`shift` bits of every number, class by class. The writer chooses the groups.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import StreamError
from .bits import pack_bits, unpack_bits
from .numbers import Unsigned, decode_numbers, encode_numbers, join, split

GROUPS = 8
_MEAN_BITS = 4  # shifted numbers have a mean in [2^3, 2^4): a smaller shift gains nothing, a larger one loses the shape
_SYMBOLS = 64  # in the cost estimate, numbers of _SYMBOLS - 1 and more count as one symbol
_TABLE_BITS, _SYMBOL_BITS = 240.0, 12.0  # size of pcodec's description of a distribution, fitted on small streams

Classes = npt.NDArray[np.uint8]


def encode_mixture(numbers: Unsigned, classes: Classes) -> bytes:
    """Encode numbers of several classes.

    Args:
        numbers: Unsigned integers [n], n > 0.
        classes: uint8 [n], class of each number, known to the reader.

    Returns:
        The stream.
    """
    counts = np.bincount(classes)
    counts = counts[counts > 0]
    numbers = numbers[np.argsort(classes, kind="stable")]
    shifts = _shifts(numbers, counts)
    widths = np.repeat(shifts, counts)
    tops = numbers >> widths
    member = np.repeat(np.arange(len(counts)), counts) * _SYMBOLS + np.minimum(tops, _SYMBOLS - 1).astype(np.int64)
    groups = _groups(np.bincount(member, minlength=len(counts) * _SYMBOLS).reshape(-1, _SYMBOLS))
    group = np.repeat(groups, counts)
    return join(
        (
            encode_numbers(shifts.astype(np.uint16) << np.uint16(3) | groups),
            *(encode_numbers(tops[group == number]) for number in range(GROUPS)),
            pack_bits(numbers, widths),
        )
    )


def decode_mixture(data: memoryview, classes: Classes, largest: int) -> npt.NDArray[np.uint64]:
    """Decode the result of `encode_mixture`.

    Args:
        data: The stream.
        classes: uint8 [n], class of each number.
        largest: Largest valid number.

    Returns:
        The numbers, uint64 [n].

    Raises:
        StreamError: The stream does not contain n numbers, or contains one above `largest`.
    """
    first, *streams, low = split(data, 2 + GROUPS)
    counts = np.bincount(classes)
    counts = counts[counts > 0]
    described = decode_numbers(first, len(counts)).astype(np.uint64)
    if (described >= 64 << 3).any():
        raise StreamError("more low bits than a number has")
    widths, group = np.repeat((described >> 3).astype(np.uint8), counts), np.repeat(described & 7, counts)
    found = np.empty(len(classes), np.uint64)
    for number, stream in enumerate(streams):
        members = group == number
        found[members] = decode_numbers(stream, int(np.count_nonzero(members)))
    if (found > np.uint64(largest) >> widths).any():
        raise StreamError(f"a number larger than {largest}")
    found = found << widths | unpack_bits(low, widths, np.dtype(np.uint64))
    numbers = np.empty(len(classes), np.uint64)
    numbers[np.argsort(classes, kind="stable")] = found
    if len(numbers) and int(numbers.max()) > largest:
        raise StreamError(f"a number larger than {largest}")
    return numbers


def _shifts(numbers: Unsigned, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Return the number of nearly uniform low bits for each class, estimated from the mean absolute deviation."""
    # f64 rounding may lead another writer to other shifts; readers decode either
    values = np.minimum(numbers, 1 << 40 if numbers.itemsize == 8 else np.iinfo(numbers.dtype).max).astype(np.float64)
    starts = np.cumsum(counts) - counts
    means = np.add.reduceat(values, starts) / counts
    deviations = np.add.reduceat(np.abs(values - np.repeat(means, counts)), starts) / counts
    return np.array([max(0, int(deviation * 4 / 3).bit_length() - _MEAN_BITS) for deviation in deviations], np.uint8)


def _groups(histograms: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Return a group for each class.

    Classes adjacent in the order of their means are merged as long as this saves bits or there are more than GROUPS.
    """
    order = np.argsort(histograms @ np.arange(_SYMBOLS) / histograms.sum(1), kind="stable")
    members, united = [[place] for place in order], histograms[order]
    costs = _costs(united)
    while len(members) > 1:
        gains = costs[:-1] + costs[1:] - _costs(united[:-1] + united[1:])
        at = int(gains.argmax())
        if gains[at] <= 0 and len(members) <= GROUPS:
            break
        members[at : at + 2] = [members[at] + members[at + 1]]
        united[at] += united[at + 1]
        costs[at] += costs[at + 1] - gains[at]
        united, costs = np.delete(united, at + 1, 0), np.delete(costs, at + 1)
    groups = np.empty(len(histograms), np.uint8)
    for number, places in enumerate(members):
        groups[places] = number
    return groups


def _costs(histograms: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the estimated size in bits of each histogram as a group, including the description of its distribution."""
    counts = histograms.astype(np.float64)
    totals = counts.sum(1)
    logs = np.log2(np.maximum(counts, 1))
    described = _TABLE_BITS + _SYMBOL_BITS * np.count_nonzero(histograms, axis=1)
    costs: npt.NDArray[np.float64] = totals * np.log2(totals) - (counts * logs).sum(1) + described
    return costs
