"""Data classes for the content of a `.lota` file's header.

`description` validates the header when it is parsed, so users of a Header do not have to.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from .dtypes import DType
from .forms import Form

Kind: TypeAlias = Literal["vector", "patch"]


def stored_digest(*parts: bytes | memoryview) -> str:
    """Compute the digest of stored bytes, which allows a file to be verified piece by piece.

    Args:
        *parts: The bytes, concatenated.

    Returns:
        The first 16 bytes of the SHA-256, in hex.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Identity:
    """Name and fingerprint of a checkpoint.

    Attributes:
        name: Name for display.
        fingerprint: `Checkpoint.fingerprint`, which identifies the checkpoint.
    """

    name: str
    fingerprint: str


@dataclass(frozen=True)
class Stream:
    """One stored stream.

    Attributes:
        codec: Name of the codec that encoded it.
        length: Length in bytes.
    """

    codec: str
    length: int


@dataclass(frozen=True)
class EntryStreams:
    """Stored entries of a block.

    Attributes:
        count: Number of entries.
        positions: Stream of the positions.
        values: Stream of the values, stored after the positions.
    """

    count: int
    positions: Stream
    values: Stream

    @property
    def length(self) -> int:
        """Length of both streams in bytes."""
        return self.positions.length + self.values.length


@dataclass(frozen=True)
class Block:
    """A range of a tensor (`Form.blocks`) in which something changes.

    Attributes:
        digest: `stored_digest` of the bytes of `delta` and `replacements`.
        delta: The additive entries, None if there are none.
        replacements: The elements whose new bits are stored, None if there are none.
        before: `touched_digest` of the elements of both parts in the base, None if not known.
        after: The same in the result, None if not known, for example after a merge.
    """

    digest: str
    delta: EntryStreams | None = None
    replacements: EntryStreams | None = None
    before: str | None = None
    after: str | None = None

    @property
    def length(self) -> int:
        """Stored length in bytes."""
        return sum(entries.length for entries in (self.delta, self.replacements) if entries)


@dataclass(frozen=True)
class TensorSpec:
    """Description of one tensor in a `.lota` file.

    Attributes:
        name: Name of the tensor.
        dtype: Dtype in the tuned checkpoint.
        shape: Shape in the tuned checkpoint.
        origin: Dtype and shape in the base, None if the base has no such tensor.
        eligible: Whether the tensor's weights are eligible; the density of a vector is computed over eligible tensors.
        base: First 8 bytes, in hex, of the digest of the base's tensor; None if the base was not available.
        blocks: One item for each of `form.blocks()`, None if nothing changes in it. Empty if the spec is not stored
            yet.
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
        """Create the spec of a tensor that has the same form in base and tuned.

        Args:
            name: Name of the tensor.
            form: Dtype and shape.
            base: First 8 bytes, in hex, of the digest of the base's tensor; None if the base is not available.
            eligible: Whether the tensor's weights are eligible.

        Returns:
            The spec, without blocks.
        """
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
        """Stored length of the blocks in bytes."""
        return sum(block.length for block in self.blocks if block)

    @property
    def entries(self) -> int:
        """Number of stored additive entries."""
        return sum(block.delta.count for block in self.blocks if block and block.delta)

    @property
    def replaced(self) -> int:
        """Number of stored replacements."""
        return sum(block.replacements.count for block in self.blocks if block and block.replacements)


@dataclass(frozen=True)
class Blob:
    """Stored bytes of a file (see `blobs`).

    Attributes:
        length: Stored length in bytes.
        size: Size of the content in bytes.
        digest: `stored_digest` of the stored bytes.
    """

    length: int
    size: int
    digest: str


@dataclass(frozen=True)
class StoredFile:
    """A file of the tuned checkpoint: the header of a shard, or a side file such as a config or tokenizer.

    Attributes:
        name: Name of the file.
        sha256: SHA-256 of its content, in hex.
        blob: The stored content, None if the base has the same file.
    """

    name: str
    sha256: str
    blob: Blob | None


@dataclass(frozen=True)
class Header:
    """The complete header of a `.lota` file.

    Attributes:
        kind: "vector" (deltas that are added to the base) or "patch" (bits relative to the base).
        base: The base checkpoint.
        tuned: The tuned checkpoint, None if it is not known.
        tensors: The tensors that change, sorted by name.
        removed: Names of the tensors of the base that the tuned checkpoint lacks, sorted.
        shards: Headers of the tuned shards, in order; None if they are those of the base.
        files: Side files of the tuned checkpoint, sorted by name; None if they are those of the base.
        provenance: How the file was made, any JSON object.
    """

    kind: Kind
    base: Identity
    tuned: Identity | None
    tensors: tuple[TensorSpec, ...]
    removed: tuple[str, ...] = ()
    shards: tuple[StoredFile, ...] | None = None
    files: tuple[StoredFile, ...] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def blobs(self) -> list[StoredFile]:
        """The stored shard headers and side files, in the order of their blobs after the blocks."""
        return [file for file in (*(self.shards or ()), *(self.files or ())) if file.blob]

    @property
    def length(self) -> int:
        """Stored length of all blocks and blobs in bytes."""
        return sum(tensor.length for tensor in self.tensors) + sum(file.blob.length for file in self.blobs if file.blob)
