"""Everything that can be wrong with a file, one class a way, and with those who read it."""

from __future__ import annotations

from .text import printable


class PlainError(Exception):
    """An error whose message may quote what a file says: `str` gives one line that is safe to print."""

    def __str__(self) -> str:
        return printable(super().__str__())


class FormatError(PlainError):
    """A file is not what it claims to be. The message names the file, the tensor, what was expected and found."""


class NotSafetensorsError(FormatError):
    """The file is not a readable safetensors file: too short, a broken header, or bytes missing at its end."""


class NotLotaError(FormatError):
    """A safetensors file without a taskvec description in its metadata."""


class VersionError(FormatError):
    """A `.lota` file of a format version that this reader does not know."""


class HeaderError(FormatError):
    """The description in the metadata is malformed, contradicts itself, or does not match the stored streams."""


class ChecksumError(FormatError):
    """Stored bytes do not have the checksum that the description gives for them."""


class StreamError(FormatError):
    """A stream does not decode to what the description says: codec, length, order or range."""


class CheckpointError(FormatError):
    """A checkpoint folder is missing, holds no safetensors, or its shards contradict each other."""


class WorkerError(PlainError):
    """A process that worked on a part was killed: by the system, where memory ran out, or by a person."""
