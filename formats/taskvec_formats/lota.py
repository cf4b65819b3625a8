"""Reader and writer of `.lota` files: safetensors containers of two U8 tensors, the index and the blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from types import TracebackType

from .blobs import pack_blob, unpack_blob
from .blocks import Change, check_block, decode_block
from .container import SafetensorsFile, encode_header
from .description import DIGEST_KEY, INDEX_BYTES, encode, parse
from .errors import ChecksumError, FormatError, HeaderError, StreamError
from .forms import Bits
from .header import Blob, Block, Header, StoredFile, TensorSpec, stored_digest
from .reading import Readable
from .system.atomic import atomic_file, naming
from .system.parallel import ordered_map
from .system.spool import Piece, Spools

INDEX, BLOCKS = "taskvec.index", "taskvec.blocks"
_HEADER_BYTES = 1 << 25  # more than the longest description takes if each of its characters is escaped


@dataclass(frozen=True)
class SideFile:
    """A side file of a checkpoint.

    Attributes:
        name: Name of the file.
        sha256: SHA-256 of its content, in hex.
        content: The content, None if the base has the same file.
    """

    name: str
    sha256: str
    content: bytes | None


class LotaWriter:
    """Write a `.lota` file block by block.

    The file appears at `path`, synced to disk, when the `with` block ends without an error. The same calls give the
    same bytes. Memory use is that of the arguments of one call, plus the index.

    Args:
        path: Path of the file.
        header: Description of the file. Its tensors, shards and files are replaced by those that are added.
        replace: Whether an existing file is replaced. If False and the file exists, FileExistsError is raised at the
            end.

    Raises:
        HeaderError: A reader would not accept the description.
        FileExistsError: The file exists and `replace` is False.
    """

    def __init__(self, path: Path, header: Header, *, replace: bool = True) -> None:
        self._path = path
        self._header = header
        self._replace = replace
        self._tensors: list[TensorSpec] = []
        self._shards: list[StoredFile] | None = None
        self._files: list[StoredFile] | None = None
        self._pieces: list[Piece] = []

    def __enter__(self) -> LotaWriter:
        parse(*encode(self._header))  # fail early if a reader would not accept the description
        # the header precedes the blocks but needs their lengths, so the blocks are first written to a temporary file
        self._spools = Spools(self._path.parent)
        return self

    def add(self, spec: TensorSpec, blocks: Iterable[tuple[Block | None, bytes | Piece]]) -> None:
        """Append one tensor.

        Args:
            spec: Description of the tensor.
            blocks: Its blocks and their bytes (see `encode_block`), in order. Pieces are copied at the end of the
                `with` block.

        Raises:
            HeaderError: The name is not in ascending order, a shard or side file was added before, or the number of
                blocks does not match the shape.
        """
        if self._tensors and spec.name <= self._tensors[-1].name:
            raise HeaderError(f"tensor {spec.name!r} must not follow {self._tensors[-1].name!r}")
        if self._shards is not None or self._files is not None:
            raise HeaderError(f"tensor {spec.name!r} must not follow a shard's header or a side file")
        stored = []
        for block, data in blocks:
            self._write(data)
            stored.append(block)
        if len(stored) != spec.form.block_count:
            raise HeaderError(f"tensor {spec.name!r}: {len(stored)} blocks, but its shape has {spec.form.block_count}")
        self._tensors.append(replace(spec, blocks=tuple(stored)))

    def add_shards(self, headers: dict[str, bytes]) -> None:
        """Add the headers of the tuned shards if they differ from those of the base.

        Args:
            headers: Mapping from file name to header.

        Raises:
            HeaderError: Side files were added before.
        """
        if self._files is not None:
            raise HeaderError("the shards' headers must not follow a side file")
        self._shards = [self._blob(name, header) for name, header in headers.items()]

    def add_files(self, files: Iterable[SideFile]) -> None:
        """Add the side files of the tuned checkpoint.

        Args:
            files: The side files. Those without content are in the base.
        """
        self._files = [
            StoredFile(file.name, file.sha256, None) if file.content is None else self._blob(file.name, file.content)
            for file in sorted(files, key=lambda file: file.name)
        ]

    def _blob(self, name: str, data: bytes) -> StoredFile:
        stored = pack_blob(data)
        self._write(stored)
        return StoredFile(name, hashlib.sha256(data).hexdigest(), Blob(len(stored), len(data), stored_digest(stored)))

    def _write(self, data: bytes | Piece) -> None:
        if isinstance(data, bytes):
            with naming(self._path):
                data = self._spools.append(0, data)
        last = self._pieces[-1] if self._pieces else None
        if last and (last.file, last.start + last.length) == (data.file, data.start):
            self._pieces[-1] = replace(last, length=last.length + data.length)
        elif data.length:
            self._pieces.append(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with naming(self._path), self._spools:
            if kind is None:
                shards, files = (None if part is None else tuple(part) for part in (self._shards, self._files))
                header = replace(self._header, tensors=tuple(self._tensors), shards=shards, files=files)
                metadata, index = encode(header)
                parse(metadata, index)  # fail before writing if a reader would not accept the file
                length = sum(piece.length for piece in self._pieces)
                layout: dict[str, tuple[str, tuple[int, ...], int]] = {
                    INDEX: ("U8", (len(index),), len(index)),
                    BLOCKS: ("U8", (length,), length),
                }
                with atomic_file(self._path, replace=self._replace) as temporary, open(temporary, "wb") as out:
                    out.write(encode_header(layout, metadata))
                    out.write(index)
                    for piece in self._pieces:
                        out.writelines(piece.chunks())


class LotaReader:
    """A `.lota` file opened for reading.

    The header is read at once, the blocks of a tensor on request.

    Args:
        place: Path of the file, or another place that its bytes are read from.

    Attributes:
        path: Path of the file; the name of another place as a path, which leads nowhere.
        is_local: Whether it is a file of this machine.
        inputs: The files that the reader reads, as absolute paths.
        size: Size of the file in bytes.
        header: The validated header.
        specs: Mapping from tensor name to TensorSpec.

    Raises:
        FormatError: The file is invalid, or container, description and index do not match. The message names the file.
    """

    def __init__(self, place: Path | Readable) -> None:
        self._file = SafetensorsFile(place, _HEADER_BYTES)
        self.path = self._file.path
        self.is_local = isinstance(place, Path)
        self.inputs: tuple[Path, ...] = (self.path.absolute(),) if self.is_local else ()
        self.size = self._file.size
        try:
            self.header = self._parse()
        except FormatError as error:
            raise type(error)(f"{self.path}: {error}") from None
        self.specs = {spec.name: spec for spec in self.header.tensors}
        # offsets in BLOCKS: of each tensor, each stored file, and each block (per tensor, computed on first use)
        self._starts: dict[str, int] = {}
        self._blobs: dict[StoredFile, int] = {}
        self._offsets: dict[str, list[int]] = {}
        offset = 0
        for spec in self.header.tensors:
            self._starts[spec.name] = offset
            offset += spec.length
        for file in self.header.blobs:
            self._blobs[file] = offset
            offset += file.blob.length if file.blob else 0

    @property
    def digest(self) -> str:
        """SHA-256 of the description, in hex. It covers, by way of the index, every byte that is read."""
        return self._file.metadata[DIGEST_KEY]

    def sha256(self) -> str:
        """Compute the SHA-256 of the whole file, in hex.

        Raises:
            NotSafetensorsError: The file cannot be read, or was changed after it was opened.
        """
        return self._file.sha256()

    def _parse(self) -> Header:
        tensors = self._file.tensors
        index = memoryview(b"")
        if INDEX in tensors:  # one byte beyond the limit is enough for `parse` to reject it
            size = tensors[INDEX].stop - tensors[INDEX].start
            index = self._file.bytes(INDEX, 0, min(size, INDEX_BYTES + 1))
        header = parse(self._file.metadata, index)
        if sorted(tensors) != sorted((INDEX, BLOCKS)):
            raise HeaderError(f"expected the tensors {INDEX} and {BLOCKS}, found {', '.join(sorted(tensors)):.200}")
        for name, info in tensors.items():
            if info.dtype.name != "U8" or len(info.shape) != 1:
                raise HeaderError(f"{name} must be U8 [n], found {info.dtype.name} {list(info.shape)}")
        (stored,) = tensors[BLOCKS].shape
        if header.length != stored:
            raise HeaderError(f"{stored} bytes of blocks, but the index describes {header.length}")
        return header

    def change(self, name: str, start: int = 0, stop: int | None = None, base: Bits | None = None) -> Change:
        """Read the change of the elements [start, stop) of a tensor.

        Only the blocks that contain these elements are read from the file.

        Args:
            name: Name of the tensor.
            start: First element.
            stop: Element after the last one, None for the end of the tensor.
            base: Carriers of the whole tensor in the base, needed for a patch. If its form differs, pass the result of
                `forms.take_for`.

        Returns:
            The change. Positions count from `start`.

        Raises:
            ChecksumError: The stored bytes were altered. The message names tensor and block.
            StreamError: A stream is invalid, or the file is a patch and no base is given. The message names tensor and
                block.
        """
        spec = self.specs[name]
        stop = spec.size if stop is None else stop
        parts = [
            (span[0], self._decode(spec, block, span, offset, base))
            for block, span, offset in self._stored(spec, start, stop)
        ]
        return Change.joined(parts, start, stop, spec.dtype)

    def _stored(self, spec: TensorSpec, start: int, stop: int) -> Iterator[tuple[Block, tuple[int, int], int]]:
        """Yield the blocks with a change that overlap [start, stop), with their range and their offset in BLOCKS."""
        if spec.name not in self._offsets:
            lengths = (block.length if block else 0 for block in spec.blocks)
            self._offsets[spec.name] = list(accumulate(lengths, initial=self._starts[spec.name]))
        for number in spec.form.numbers_of(start, stop):
            if block := spec.blocks[number]:
                yield block, spec.form.block(number), self._offsets[spec.name][number]

    def _decode(self, spec: TensorSpec, block: Block, span: tuple[int, int], offset: int, base: Bits | None) -> Change:
        data = self._file.bytes(BLOCKS, offset, offset + block.length)
        with self._naming(spec, span, offset):
            if self.header.kind == "vector":
                return decode_block(spec.form, block, span, data)
            if base is None:
                raise StreamError("a patch can be read only with its base")
            return decode_block(spec.form, block, span, data, base[slice(*span)])

    @contextmanager
    def _naming(self, spec: TensorSpec, span: tuple[int, int], offset: int) -> Iterator[None]:
        """Add file, tensor and byte offset to the message of a FormatError."""
        try:
            yield
        except FormatError as error:
            place = f"tensor {spec.name!r}, block at element {span[0]}"
            byte = self._file.tensors[BLOCKS].start + offset
            raise type(error)(f"{self.path}: {place}, byte {byte} of the file: {error}") from None

    def shards(self) -> dict[str, bytes] | None:
        """Read the headers of the tuned shards.

        Returns:
            Mapping from file name to header, None if the shards are those of the base.

        Raises:
            ChecksumError: A stored header was altered.
        """
        shards = self.header.shards
        return None if shards is None else {shard.name: self.content(shard) for shard in shards}

    def files(self) -> list[SideFile] | None:
        """Read the side files of the tuned checkpoint.

        Returns:
            The side files, None if they are those of the base.

        Raises:
            ChecksumError: A stored file was altered.
        """
        files = self.header.files
        if files is None:
            return None
        return [SideFile(file.name, file.sha256, self.content(file) if file.blob else None) for file in files]

    def content(self, file: StoredFile) -> bytes:
        """Read the content of a stored shard header or side file.

        Args:
            file: One of the shards or files of the header.

        Returns:
            The content.

        Raises:
            ValueError: The file is not stored.
            ChecksumError: The stored bytes were altered.
        """
        if file.blob is None:
            raise ValueError(f"{file.name} is not stored")
        offset = self._blobs[file]
        stored = self._file.bytes(BLOCKS, offset, offset + file.blob.length)
        if stored_digest(stored) != file.blob.digest:
            raise ChecksumError(f"{self.path}: {file.name!r}: the stored bytes do not have the digest given for them")
        data = unpack_blob(stored, file.blob.size, f"{self.path}: {file.name!r}")
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise ChecksumError(f"{self.path}: {file.name!r} does not have the SHA-256 given for it")
        return data

    def verify(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Check every digest, and decode everything that can be decoded without a base.

        Args:
            progress: Called with the number of finished tensors and the number of all tensors with changes.

        Raises:
            FormatError: The first failure.
        """

        def check(spec: TensorSpec) -> None:
            for block, span, offset in self._stored(spec, 0, spec.size):
                if self.header.kind == "vector":
                    self._decode(spec, block, span, offset, None)
                    continue
                with self._naming(spec, span, offset):
                    check_block(block, self._file.bytes(BLOCKS, offset, offset + block.length))

        changing = [spec for spec in self.header.tensors if any(spec.blocks)]
        progress(0, len(changing))
        for done, _ in enumerate(ordered_map(check, changing), 1):
            progress(done, len(changing))
        for file in self.header.blobs:
            self.content(file)
