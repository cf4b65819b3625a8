"""What a `.lota` file says of itself. `description` validates it; whoever holds a Header need not."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

from .dtypes import DType
from .forms import Form


def stored_digest(*parts: bytes | memoryview) -> str:
    """The first 16 bytes of the SHA-256 of stored bytes, in hex: what makes a file safe to read piece by piece."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Identity:
    """A checkpoint: its name, for people, and its fingerprint (Checkpoint.fingerprint), which decides."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class Stream:
    """One stored stream: the codec that wrote it and its length in bytes."""

    codec: str
    length: int


@dataclass(frozen=True)
class EntryStreams:
    """Stored entries of a block: how many, their positions, then their values."""

    count: int
    positions: Stream
    values: Stream

    @property
    def length(self) -> int:
        """Bytes of both streams."""
        return self.positions.length + self.values.length


@dataclass(frozen=True)
class Block:
    """A range of a tensor (Form.blocks) in which something changes.

    digest: stored_digest of the bytes of both parts.
    delta: the additive entries; replacements: the elements whose bits are given; None for none.
    before, after: touched_digest of the elements that either holds, in the base and in the result; None where not
        known, as in a merge.
    """

    digest: str
    delta: EntryStreams | None = None
    replacements: EntryStreams | None = None
    before: str | None = None
    after: str | None = None

    @property
    def length(self) -> int:
        """Bytes stored."""
        return sum(entries.length for entries in (self.delta, self.replacements) if entries)


@dataclass(frozen=True)
class TensorSpec:
    """What a `.lota` file says of one tensor.

    name, dtype, shape: in the tuned checkpoint.
    origin: dtype and shape in the base, or None where the base has no such tensor.
    eligible: whether its weights could have been chosen; the density of a vector is counted over these.
    base: the first 8 bytes of the digest of the base's tensor, or None where the base was not at hand.
    blocks: one for each of form.blocks(), None where nothing changes; empty in a spec that is not stored yet.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    origin: Form | None
    eligible: bool = True
    base: str | None = None
    blocks: tuple[Block | None, ...] = ()

    @classmethod
    def like(cls, name: str, form: Form, base: str | None = None, *, eligible: bool = True) -> TensorSpec:
        """A tensor that has the same form in base and tuned."""
        return cls(name, form.dtype, form.shape, form, eligible, base)

    @property
    def form(self) -> Form:
        """Dtype and shape in the tuned checkpoint."""
        return Form(self.dtype, self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def length(self) -> int:
        """Bytes of its blocks."""
        return sum(block.length for block in self.blocks if block)

    @property
    def entries(self) -> int:
        """Number of stored additive entries."""
        return sum(block.delta.count for block in self.blocks if block and block.delta)

    @property
    def replaced(self) -> int:
        """Number of stored elements whose bits are given."""
        return sum(block.replacements.count for block in self.blocks if block and block.replacements)


@dataclass(frozen=True)
class Blob:
    """Stored bytes (blobs): their length, the size of what they hold, and their stored_digest."""

    length: int
    size: int
    digest: str


@dataclass(frozen=True)
class StoredFile:
    """A file of the tuned checkpoint that is not listed in `tensors`: a shard's header, a config, a tokenizer.

    sha256: of its content. blob: the content, or None where the base has the same.
    """

    name: str
    sha256: str
    blob: Blob | None


@dataclass(frozen=True)
class Header:
    """All that a file says.

    kind: "vector" (deltas that are added) or "patch" (bits relative to the base).
    base, tuned: the checkpoints; tuned None where the vector was not taken from one and its result is not known.
    tensors: in the order of their names. removed: names of the tensors of the base that tuned lacks, sorted.
    shards: the headers of the tuned shards, in order; None for those of the base.
    files: the side files of the tuned checkpoint, sorted; None for those of the base.
    provenance: how it came about, any JSON object.
    """

    kind: str
    base: Identity
    tuned: Identity | None
    tensors: tuple[TensorSpec, ...]
    removed: tuple[str, ...] = ()
    shards: tuple[StoredFile, ...] | None = None
    files: tuple[StoredFile, ...] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def blobs(self) -> list[StoredFile]:
        """Shard headers and side files that are stored, in the order of their blobs behind the blocks."""
        return [file for file in (*(self.shards or ()), *(self.files or ())) if file.blob]

    @property
    def length(self) -> int:
        """Bytes of all blocks and blobs."""
        return sum(tensor.length for tensor in self.tensors) + sum(file.blob.length for file in self.blobs if file.blob)
