"""Exceptions of the file formats and their readers, one class for each kind of failure."""

from __future__ import annotations

from .text import printable


class PlainError(Exception):
    """An error whose message may quote the content of a file: `str` returns one line that is safe to print."""

    def __str__(self) -> str:
        return printable(super().__str__())


class FormatError(PlainError):
    """A file is invalid. The message names the file, the tensor, what was expected and what was found."""


class NotSafetensorsError(FormatError):
    """The file is not a readable safetensors file: too short, truncated, or with a broken header."""


class NotLotaError(FormatError):
    """A safetensors file without a taskvec description in its metadata."""


class VersionError(FormatError):
    """A `.lota` file of a format version that this reader does not support."""


class HeaderError(FormatError):
    """The description in the metadata is malformed, contradicts itself, or does not match the stored streams."""


class ChecksumError(FormatError):
    """Stored bytes do not match the checksum given in the description."""


class StreamError(FormatError):
    """A stream does not decode to what the description says (codec, length, order or range)."""


class CheckpointError(FormatError):
    """A model folder is missing or invalid, for example because its shards contradict each other."""


class NotModelError(CheckpointError):
    """The path is not a model: a `.lota` file, a device, a pipe or a folder without a safetensors file."""


class WorkerError(PlainError):
    """A worker process was killed, either by the system because memory ran out or by the user."""
