"""The digest of a vector: 16 hex digits that identify its content.

It is the beginning of the SHA-256 of a text that this module writes field by field. A field that a later version adds
therefore cannot change the digest of an existing file. docs/format.md, section "Digest of a vector", defines the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from taskvec_formats import Form, Identity, TensorSpec
from taskvec_formats.dtypes import DType
from taskvec_formats.header import Block, EntryStreams, Stream


def digest_of(base: Identity, specs: Iterable[TensorSpec], more: Iterable[object] = ()) -> str:
    """Return the digest of a vector.

    Args:
        base: The checkpoint that the vector was taken from.
        specs: The tensors of the vector, in the order of their names.
        more: Further identifying values of a vector that is not stored yet: its result, if known, and a text.
    """
    parts = [_identity(base), *map(_spec, specs)]
    parts += [_identity(part) if isinstance(part, Identity) else repr(part) for part in more]
    return hashlib.sha256(f"[{', '.join(parts)}]".encode()).hexdigest()[:16]


def _identity(identity: Identity) -> str:
    return f"Identity(name={identity.name!r}, fingerprint={identity.fingerprint!r})"


def _spec(spec: TensorSpec) -> str:
    origin = None if spec.origin is None else _form(spec.origin)
    blocks = ", ".join("None" if block is None else _block(block) for block in spec.blocks)
    return (
        f"TensorSpec(name={spec.name!r}, dtype={_dtype(spec.dtype)}, shape={spec.shape!r}, origin={origin}, "
        f"eligible={spec.eligible}, base={spec.base!r}, blocks=({blocks}{',' * (len(spec.blocks) == 1)}))"
    )


def _form(form: Form) -> str:
    return f"Form(dtype={_dtype(form.dtype)}, shape={form.shape!r})"


def _dtype(dtype: DType) -> str:
    return (
        f"DType(name={dtype.name!r}, itemsize={dtype.itemsize}, float_name={dtype.float_name!r}, "
        f"mantissa={dtype.mantissa})"
    )


def _block(block: Block) -> str:
    delta, replacements = (None if part is None else _entries(part) for part in (block.delta, block.replacements))
    return (
        f"Block(digest={block.digest!r}, delta={delta}, replacements={replacements}, before={block.before!r}, "
        f"after={block.after!r})"
    )


def _entries(entries: EntryStreams) -> str:
    return f"Entries(count={entries.count}, positions={_stream(entries.positions)}, values={_stream(entries.values)})"


def _stream(stream: Stream) -> str:
    return f"Stream(codec={stream.codec!r}, length={stream.length})"
