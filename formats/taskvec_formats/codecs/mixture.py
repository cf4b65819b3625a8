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
    """numbers: unsigned [n]; classes: uint8 [n], the class of each, which the reader knows."""
    counts = np.bincount(classes)
    present = np.flatnonzero(counts)
    segments = np.split(numbers[np.argsort(classes, kind="stable")], np.cumsum(counts[present])[:-1])
    shifts = [_shift(segment) for segment in segments]
    tops = [segment >> segment.dtype.type(shift) for segment, shift in zip(segments, shifts, strict=True)]
    groups = _group(tops)
    described = [shift << 3 | group for shift, group in zip(shifts, groups, strict=True)]
    widths = np.repeat(np.array(shifts, np.uint8), counts[present])
    return join(
        (
            encode_numbers(np.array(described, np.uint16)),
            *(
                encode_numbers(np.concatenate([numbers[:0], *_members(tops, groups, number)]))
                for number in range(GROUPS)
            ),
            pack_bits(np.concatenate(segments), widths),
        )
    )


def decode_mixture(data: memoryview, classes: Classes, largest: int) -> npt.NDArray[np.uint64]:
    """Return a number, at most `largest`, for each of `classes`. Raises StreamError where the stream holds others."""
    first, *streams, low = split(data, 2 + GROUPS)
    counts = np.bincount(classes)
    counts = counts[counts > 0]
    described = decode_numbers(first, len(counts)).astype(np.uint64)
    shifts, groups = described >> 3, described & 7
    if (shifts >= 64).any():
        raise StreamError("more low bits than a number has")
    segments: list[npt.NDArray[np.uint64]] = [np.empty(0, np.uint64)] * len(counts)
    for number, stream in enumerate(streams):
        members = np.flatnonzero(groups == number)
        top = decode_numbers(stream, int(counts[members].sum())).astype(np.uint64)
        for member, segment in zip(members, np.split(top, np.cumsum(counts[members])[:-1]), strict=False):
            segments[member] = segment
    widths = np.repeat(shifts.astype(np.uint8), counts)
    found = np.concatenate([np.empty(0, np.uint64), *segments])
    if (found > np.uint64(largest) >> widths).any():
        raise StreamError(f"a number larger than {largest}")
    found = found << widths | unpack_bits(low, widths, np.dtype(np.uint64))
    numbers = np.empty(len(classes), np.uint64)
    numbers[np.argsort(classes, kind="stable")] = found
    if len(numbers) and int(numbers.max()) > largest:
        raise StreamError(f"a number larger than {largest}")
    return numbers


def _members(tops: list[Unsigned], groups: list[int], number: int) -> list[Unsigned]:
    return [top for top, group in zip(tops, groups, strict=True) if group == number]


def _shift(numbers: Unsigned) -> int:
    """Low bits that are nearly uniform, by the mean absolute deviation."""
    # where f64 rounds, a writer elsewhere may choose otherwise; what is read is the same
    values = np.minimum(numbers, np.uint64(1 << 40)).astype(np.float64)
    width = float(np.abs(values - values.mean()).mean()) * 4 / 3
    return max(0, int(width).bit_length() - _MEAN_BITS)


def _group(tops: list[Unsigned]) -> list[int]:
    """A group for each class: neighbours by mean are united as long as that saves bits."""
    histograms = [
        np.bincount(np.minimum(top, np.uint8(_SYMBOLS - 1)).astype(np.uint8), minlength=_SYMBOLS) for top in tops
    ]
    means = [float(counts @ np.arange(_SYMBOLS)) / len(top) for counts, top in zip(histograms, tops, strict=True)]
    order = sorted(range(len(tops)), key=means.__getitem__)
    groups = [([place], histograms[place]) for place in order]
    costs = [_cost(counts) for _, counts in groups]
    gains = [_gain(groups, costs, at) for at in range(len(groups) - 1)]
    while gains and (max(gains) > 0 or len(groups) > GROUPS):
        at = gains.index(max(gains))
        groups[at : at + 2] = [(groups[at][0] + groups[at + 1][0], groups[at][1] + groups[at + 1][1])]
        costs[at : at + 2] = [_cost(groups[at][1])]
        del gains[at]
        for near in (at - 1, at):
            if 0 <= near < len(gains):
                gains[near] = _gain(groups, costs, near)
    return [number for place in range(len(tops)) for number, (members, _) in enumerate(groups) if place in members]


def _cost(counts: npt.NDArray[np.int64]) -> float:
    held = counts[counts > 0].astype(np.float64)
    return float(held.sum() * np.log2(held.sum()) - held @ np.log2(held)) + _TABLE_BITS + _SYMBOL_BITS * len(held)


def _gain(groups: list[tuple[list[int], npt.NDArray[np.int64]]], costs: list[float], at: int) -> float:
    return costs[at] + costs[at + 1] - _cost(groups[at][1] + groups[at + 1][1])
