"""Encode and decode one block of a tensor."""

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
# option -> codecs of positions and of values that a writer tries; it keeps the smallest result
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
# fallback that supports every block: codecs based on pcodec are limited to 2^24 numbers
_ANY = POSITION_CODECS["plain"], VALUE_CODECS["plain"]
_LARGE = Lock()  # blocks of one long row take much memory, so only one of them is decoded at a time
_SAMPLE = 4096  # values of a block are alike, so this many are enough to choose the codec


@dataclass(frozen=True)
class Change:
    """What happens to a range of a tensor. Flat positions count from the start of the range.

    Attributes:
        delta: Additive entries, values f32.
        replacements: Elements whose new bits are given, values are carriers of the dtype. In a vector, the few results
            that base + delta does not give exactly; in a patch, all changed elements.
    """

    delta: SparseTensor
    replacements: SparseTensor

    @classmethod
    def joined(cls, parts: list[tuple[int, Change]], start: int, stop: int, dtype: DType) -> Change:
        """Join the changes of parts of a tensor.

        Args:
            parts: In order, the position of the first element of a part, and its change (see `SparseTensor.concat`).
            start: First element of the joined range.
            stop: Element after the last one.
            dtype: Dtype of the tensor.

        Returns:
            The change of the range [start, stop).
        """
        delta = SparseTensor.concat([(first, part.delta) for first, part in parts], start, stop, np.float32)
        replacements = [(first, part.replacements) for first, part in parts]
        return cls(delta, SparseTensor.concat(replacements, start, stop, dtype.carrier))

    def touched(self) -> Indices:
        """Return the positions of `delta` and `replacements` together, increasing."""
        if not len(self.delta):
            return self.replacements.indices
        if not len(self.replacements):
            return self.delta.indices
        merged = np.sort(np.concatenate((self.delta.indices, self.replacements.indices)), kind="stable")
        first: Indices = merged[np.append(True, merged[1:] != merged[:-1])]
        return first


def touched_digest(spec: TensorSpec, start: int, bits: BitArray) -> str:
    """Compute the digest of the touched elements of a block.

    It is the first 8 bytes of the SHA-256 of a line with name, dtype, shape and the block's first element, followed by
    the bits of the elements. It distinguishes checkpoints. It does not protect against forgery, because the user
    chooses the base.

    Args:
        spec: Description of the tensor.
        start: Position of the block's first element.
        bits: Carriers of the touched elements, [touched].

    Returns:
        The digest, in hex.
    """
    digest = hashlib.sha256(f"{spec.name} {spec.form} {start}\n".encode())
    digest.update(np.ascontiguousarray(bits).data)
    return digest.hexdigest()[:16]


def encode_block(
    form: Form, change: Change, base: BitArray | None = None, codec: str = AUTO
) -> tuple[Block | None, bytes]:
    """Encode the entries of one block.

    Args:
        form: Form of the tensor.
        change: Change of the block.
        base: Carriers of the block in the base. None if the entries must be readable without the base (vectors).
        codec: One of CODECS.

    Returns:
        The description of the block, without `before` and `after`, and its bytes; (None, b"") if there are no entries.

    Raises:
        StreamError: A delta is not a finite number.
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
    """Decode the entries of one block, the inverse of `encode_block`.

    Args:
        form: Form of the tensor.
        block: Description of the block.
        span: Flat range [start, stop) of the block.
        data: The stored bytes.
        base: Carriers of the block in the base, None for a vector.

    Returns:
        The change of the block.

    Raises:
        ChecksumError: The bytes do not match the digest of the block.
        StreamError: A stream does not match its description.
    """
    check_block(block, data)
    frame = _frame(form, span[1] - span[0], base)
    cut = block.delta.length if block.delta else 0
    with _LARGE if frame.size > BLOCK_ELEMENTS else nullcontext():
        delta = _decode(block.delta, data[:cut], DELTA, frame, "delta")
        _check_finite(delta)
        return Change(delta, _decode(block.replacements, data[cut:], form.dtype.carrier, frame, "replacements"))


def _check_finite(delta: SparseTensor) -> None:
    """Raise StreamError for deltas that are NaN or infinite: such results must be stored as replacements."""
    finite = np.isfinite(delta.values)
    if not finite.all():
        place = int(np.argmin(finite))
        raise StreamError(f"delta: {delta.values[place]} at position {delta.indices[place]} is not a finite number")


def check_block(block: Block, data: memoryview) -> None:
    """Check the stored bytes of a block.

    Args:
        block: Description of the block.
        data: The stored bytes.

    Raises:
        ChecksumError: The bytes do not match the digest of the block.
    """
    if stored_digest(data) != block.digest:
        raise ChecksumError("the stored bytes do not have the digest given in the index")


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
    """Return name and bytes of the codec with the shortest result, or of `any_block` if no codec supports the block."""
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
