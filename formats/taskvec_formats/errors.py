"""Everything that can be wrong with a file, one class a way, and with those who read it. Imports nothing."""


class FormatError(Exception):
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


class WorkerError(Exception):
    """A process that worked on a part was killed: by the system, where memory ran out, or by a person."""
