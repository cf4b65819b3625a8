"""The `.lota` file and the checkpoints it applies to. Needs numpy, safetensors and zstandard; never torch."""

from .checkpoint import Checkpoint
from .errors import FormatError
from .header import Base, Header, TensorSpec
from .lota import LotaReader, LotaWriter
from .sparse import SparseTensor

__all__ = ["Base", "Checkpoint", "FormatError", "Header", "LotaReader", "LotaWriter", "SparseTensor", "TensorSpec"]
