"""taskvec: train, store, merge and apply sparse task vectors (Lottery Ticket Adaptation, arXiv 2406.16797).

Importing this package loads neither torch nor transformers; training and live models do, when they are called.
"""

from typing import TYPE_CHECKING, Any

from taskvec_formats import Checkpoint, FormatError, SparseTensor

from .algebra.compose import compose
from .analysis.overlap import overlap
from .applying.apply import Applied, apply, check_result
from .applying.output import Output
from .errors import TaskvecError
from .hub import open_checkpoint
from .merging import merge
from .vectors.diff import diff
from .vectors.vector import TaskVector

if TYPE_CHECKING:
    from .models.leaves import sparse_finetune

__version__ = "0.1.0"
__all__ = [
    "Applied",
    "Checkpoint",
    "FormatError",
    "Output",
    "SparseTensor",
    "TaskVector",
    "TaskvecError",
    "apply",
    "check_result",
    "compose",
    "diff",
    "merge",
    "open_checkpoint",
    "overlap",
    "sparse_finetune",
]


def __getattr__(name: str) -> Any:
    if name == "sparse_finetune":  # it needs torch
        from .models.leaves import sparse_finetune

        return sparse_finetune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
