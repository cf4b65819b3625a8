"""Numbers of several classes, each class with a distribution of its own, through as few entropy coders as pay.

A distribution costs some forty bytes to describe, so classes whose numbers are distributed alike share one. Where the
numbers of a class are large, their low bits are nearly uniform and are stored as they are.

Stream: for each class that occurs, 8 · shift + its group; for each group, number >> shift of its classes in turn; the
low `shift` bits of every number, class by class. How classes are grouped is the writer's choice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import StreamError
from .bits import pack_bits, unpack_bits
from .numbers import Unsigned, decode_numbers, encode_numbers, join, split

GROUPS = 8
_MEAN_BITS = 4  # a shift leaves a mean in [2^3, 2^4): finer gains nothing, coarser loses the shape
_SYMBOLS = 64  # for the estimate of a group's cost, larger numbers count as this one
_TABLE_BITS, _SYMBOL_BITS = 240.0, 12.0  # what pcodec takes to describe a distribution, fitted on small streams

Classes = npt.NDArray[np.uint8]


def encode_mixture(numbers: Unsigned, classes: Classes) -> bytes:
    """numbers: unsigned [n], n > 0; classes: uint8 [n], the class of each, which the reader knows."""
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
    """Return a number, at most `largest`, for each of `classes`. Raises StreamError where the stream holds others."""
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
    """Low bits that are nearly uniform, of each class in turn, by the mean absolute deviation."""
    # where f64 rounds, a writer elsewhere may choose otherwise; what is read is the same
    values = np.minimum(numbers, 1 << 40 if numbers.itemsize == 8 else np.iinfo(numbers.dtype).max).astype(np.float64)
    starts = np.cumsum(counts) - counts
    means = np.add.reduceat(values, starts) / counts
    deviations = np.add.reduceat(np.abs(values - np.repeat(means, counts)), starts) / counts
    return np.array([max(0, int(deviation * 4 / 3).bit_length() - _MEAN_BITS) for deviation in deviations], np.uint8)


def _groups(histograms: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """A group for each class, by how often it has each symbol: neighbours by mean unite as long as that saves bits."""
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
    """Bits that a group of each histogram takes, its description included."""
    held = histograms.astype(np.float64)
    totals = held.sum(1)
    logs = np.log2(np.maximum(held, 1))
    described = _TABLE_BITS + _SYMBOL_BITS * np.count_nonzero(histograms, axis=1)
    costs: npt.NDArray[np.float64] = totals * np.log2(totals) - (held * logs).sum(1) + described
    return costs
