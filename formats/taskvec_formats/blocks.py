"""One block of one tensor: its entries to bytes and back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

import numpy as np

from .codecs import POSITION_CODECS, VALUE_CODECS, Frame, Gaps, PositionCodec, ValueCodec
from .dtypes import BitArray, DType
from .errors import ChecksumError, StreamError
from .forms import BLOCK_ELEMENTS, Form
from .header import Block, EntryStreams, Stream, TensorSpec, stored_digest
from .sparse import Indices, SparseTensor

Codec = TypeVar("Codec", PositionCodec, ValueCodec)
DELTA = np.dtype("<f4")
AUTO = "auto"
# what a writer may be asked for: the codecs of positions and of values that are tried, the smallest result kept
_CHOICES: dict[str, tuple[tuple[PositionCodec, ...], tuple[ValueCodec, ...]]] = {
    AUTO: (
        tuple(POSITION_CODECS[name] for name in ("gaps", "exponents", "plain")),
        tuple(VALUE_CODECS[name] for name in ("floats", "steps", "packed", "plain")),
    ),
    "fast": ((Gaps(level=0),), (VALUE_CODECS["plain"],)),
    "paper64": ((POSITION_CODECS["paper64"],), (VALUE_CODECS["plain"],)),
    "plain": ((POSITION_CODECS["plain"],), (VALUE_CODECS["plain"],)),
}
CODECS = tuple(_CHOICES)
# what suits every block, and is taken where no codec of a choice does: those that code numbers take 2^24 of them
_ANY = POSITION_CODECS["plain"], VALUE_CODECS["plain"]
_LARGE = Lock()  # blocks of one long row take much memory: they are decoded one at a time, whatever the threads
_SAMPLE = 4096  # values of one block are alike: this many tell which codec suits them


@dataclass(frozen=True)
class Change:
    """What happens to a range of a tensor: flat positions count from the start of the range.

    delta: additive entries, values f32. replacements: elements whose bits are given, values are carriers of the dtype:
    in a vector the few results that base + delta does not give, in a patch all of them.
    """

    delta: SparseTensor
    replacements: SparseTensor

    @classmethod
    def joined(cls, parts: list[tuple[int, Change]], start: int, stop: int, dtype: DType) -> Change:
        """What happens to the range [start, stop) of a tensor of `dtype`, from that of parts (SparseTensor.joined)."""
        delta = SparseTensor.concat([(first, part.delta) for first, part in parts], start, stop, np.float32)
        replacements = [(first, part.replacements) for first, part in parts]
        return cls(delta, SparseTensor.concat(replacements, start, stop, dtype.carrier))

    def touched(self) -> Indices:
        """Positions that either holds, increasing."""
        if not len(self.delta):
            return self.replacements.indices
        if not len(self.replacements):
            return self.delta.indices
        merged = np.sort(np.concatenate((self.delta.indices, self.replacements.indices)), kind="stable")
        first: Indices = merged[np.append(True, merged[1:] != merged[:-1])]
        return first


def touched_digest(spec: TensorSpec, start: int, bits: BitArray) -> str:
    """8 bytes, in hex, of the SHA-256 of the touched elements of a block.

    Of a line of name, dtype, shape and the block's first element, then the elements' bits, [touched]. It tells one
    checkpoint from another; it does not guard against forgery, as the base is whatever the user gives.
    """
    digest = hashlib.sha256(f"{spec.name} {spec.form} {start}\n".encode())
    digest.update(np.ascontiguousarray(bits).data)
    return digest.hexdigest()[:16]


def encode_block(
    form: Form, change: Change, base: BitArray | None = None, codec: str = AUTO
) -> tuple[Block | None, bytes]:
    """The entries of one block and their description, `before` and `after` left out; (None, b"") where there are none.

    base: carriers of the block in the base; None where entries must be readable without it (vectors).
    Raises StreamError for a delta that is not a finite number.
    """
    _check_finite(change.delta)
    frame = _frame(form, change.delta.size, base)
    delta, first = _encode(change.delta.indices, change.delta.values.view("<u4"), frame, codec)
    replacements, second = _encode(change.replacements.indices, change.replacements.values, frame, codec)
    if delta is None and replacements is None:
        return None, b""
    data = first + second
    return Block(stored_digest(data), delta, replacements), data


def decode_block(
    form: Form, block: Block, span: tuple[int, int], data: memoryview, base: BitArray | None = None
) -> Change:
    """The inverse. Raises ChecksumError for bytes other than those described, StreamError for streams that lie."""
    check_block(block, data)
    frame = _frame(form, span[1] - span[0], base)
    cut = block.delta.length if block.delta else 0
    with _LARGE if frame.size > BLOCK_ELEMENTS else nullcontext():
        delta = _decode(block.delta, data[:cut], DELTA, frame, "delta")
        _check_finite(delta)
        return Change(delta, _decode(block.replacements, data[cut:], form.dtype.carrier, frame, "replacements"))


def _check_finite(delta: SparseTensor) -> None:
    """A weight plus NaN or an infinity would be neither, whatever the weight: bits that are such are replacements."""
    finite = np.isfinite(delta.values)
    if not finite.all():
        place = int(np.argmin(finite))
        raise StreamError(f"delta: {delta.values[place]} at position {delta.indices[place]} is not a finite number")


def check_block(block: Block, data: memoryview) -> None:
    """Raise ChecksumError for bytes other than those described."""
    if stored_digest(data) != block.digest:
        raise ChecksumError("the stored bytes do not have the digest that the index gives for them")


def _frame(form: Form, size: int, base: BitArray | None) -> Frame:
    return Frame(size // form.cols, form.cols, form.dtype, base)


def _encode(indices: Indices, values: BitArray, frame: Frame, codec: str) -> tuple[EntryStreams | None, bytes]:
    if not len(indices):
        return None, b""
    position_codecs, value_codecs = _CHOICES[codec]
    positions, first = _smallest(position_codecs, _ANY[0], lambda each: each.encode(indices, frame))
    if len(value_codecs) > 1 and len(indices) > 2 * _SAMPLE:
        part = slice(len(indices) // 2, len(indices) // 2 + _SAMPLE)
        best, _ = _smallest(value_codecs, _ANY[1], lambda each: each.encode(values[part], indices[part], frame))
        value_codecs = (VALUE_CODECS[best], VALUE_CODECS["plain"])
    value_name, second = _smallest(value_codecs, _ANY[1], lambda each: each.encode(values, indices, frame))
    streams = Stream(positions, len(first)), Stream(value_name, len(second))
    return EntryStreams(len(indices), *streams), first + second


def _smallest(codecs: Iterable[Codec], any_block: Codec, encode: Callable[[Codec], bytes | None]) -> tuple[str, bytes]:
    """The name and the bytes of the codec that takes least; `any_block` where none of them suits."""
    found = {each.name: data for each in codecs if (data := encode(each)) is not None}
    if not found:
        return any_block.name, encode(any_block) or b""
    return min(found.items(), key=lambda pair: len(pair[1]))


def _decode(
    entries: EntryStreams | None, data: memoryview, dtype: np.dtype[Any], frame: Frame, part: str
) -> SparseTensor:
    shape = (frame.size,)
    if entries is None:
        return SparseTensor.empty(shape, dtype)
    cut = entries.positions.length
    try:
        indices = POSITION_CODECS[entries.positions.codec].decode(data[:cut], entries.count, frame)
        sparse = SparseTensor.owning(shape, indices, np.zeros(len(indices), dtype))
        carrier = np.dtype(f"<u{dtype.itemsize}")
        values = VALUE_CODECS[entries.values.codec].decode(data[cut:], carrier, sparse.indices, frame)
        return sparse._holding(values.view(dtype))
    except StreamError as error:
        raise StreamError(f"{part}: {error}") from None
