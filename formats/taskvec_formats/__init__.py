"""Read and write `.lota` files and safetensors checkpoints.

The package needs numpy, ml_dtypes, safetensors, zstandard, pcodec and blake3. It never imports torch.
"""

from .blocks import Change
from .checkpoint import Checkpoint, HubCommit, ModelFolder
from .errors import FormatError
from .forms import Form
from .header import Header, Identity, Kind, TensorSpec
from .lota import LotaReader, LotaWriter, SideFile
from .sparse import SparseTensor

__all__ = [
    "Change",
    "Checkpoint",
    "Form",
    "FormatError",
    "Header",
    "HubCommit",
    "Identity",
    "Kind",
    "LotaReader",
    "LotaWriter",
    "ModelFolder",
    "SideFile",
    "SparseTensor",
    "TensorSpec",
]
