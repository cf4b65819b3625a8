"""taskvec: train, store, merge and apply sparse task vectors (Lottery Ticket Adaptation, arXiv 2406.16797).

The names in `__all__`, the errors in `taskvec.errors` and the names that `taskvec.merging` exports are the public
interface. Everything else may change without notice. Importing this package does not load torch or transformers; the
functions that need them import them when they are called.
"""

from typing import TYPE_CHECKING, Any

from taskvec_formats import Checkpoint, FormatError, SparseTensor

from . import errors
from .api import (
    MergedModel,
    applied,
    apply,
    compose,
    diff,
    evaluate,
    merge,
    overlap,
    sparse_finetune,
    train,
    verify,
    write_model,
)
from .applying.apply import Applied
from .errors import TaskvecError
from .hub import open_checkpoint
from .vectors.vector import TaskVector
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .training.options import TrainingOptions

__all__ = [
    "Applied",
    "Checkpoint",
    "FormatError",
    "MergedModel",
    "SparseTensor",
    "TaskVector",
    "TaskvecError",
    "TrainingOptions",
    "applied",
    "apply",
    "compose",
    "diff",
    "errors",
    "evaluate",
    "merge",
    "open_checkpoint",
    "overlap",
    "sparse_finetune",
    "train",
    "verify",
    "write_model",
]


def __getattr__(name: str) -> Any:
    if name == "TrainingOptions":  # imported on demand: it takes a tenth of a second, and most commands do not need it
        from .training.options import TrainingOptions

        return TrainingOptions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
