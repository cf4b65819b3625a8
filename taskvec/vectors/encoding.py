"""Encoding of one block of a vector, with digests of the elements that it changes."""

from __future__ import annotations

from dataclasses import replace

from taskvec_formats import Change, Kind, TensorSpec
from taskvec_formats.blocks import encode_block, touched_digest
from taskvec_formats.dtypes import BitArray
from taskvec_formats.errors import StreamError
from taskvec_formats.header import Block

from .delta import touched_bits


def encode(
    vector: str, kind: Kind, spec: TensorSpec, number: int, change: Change, base: BitArray | None, codec: str
) -> tuple[Block | None, bytes]:
    """Encode the change of a block.

    Args:
        vector: The name of the vector, for messages.
        kind: Its kind.
        spec: The tensor.
        number: The number of the block.
        change: The change of the block.
        base: Carriers of the block in the base, [size of the block]; None if the base is not available. The digests are
            then those that the spec has, if any.
        codec: One of `blocks.CODECS`.

    Returns:
        As `encode_block`, with the digests.

    Raises:
        StreamError: A delta is not a finite number.
    """
    try:
        block, data = encode_block(spec.form, change, base if kind == "patch" else None, codec)
    except StreamError as error:
        raise StreamError(f"{vector}: tensor {spec.name!r}: {error}") from None
    if block is None:
        return None, data
    if base is None:
        # a file that is saved again keeps its digests
        known = spec.blocks[number] if spec.blocks else None
        before, after = (known.before, known.after) if known else (None, None)
    else:
        start = spec.form.block(number)[0]
        before, after = (touched_digest(spec, start, bits) for bits in touched_bits(spec.dtype, base, change))
    return replace(block, before=before, after=after), data
