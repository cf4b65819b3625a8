"""taskvec: train, store, merge and apply sparse task vectors (Lottery Ticket Adaptation, arXiv 2406.16797).

The names in `__all__`, the errors in `taskvec.errors` and the names that `taskvec.interop`, `taskvec.merging` and
`taskvec.recipes` export are the public interface. Everything else may change without notice. Importing this package
does not load torch or transformers; the functions that need them import them when they are called, and raise
`errors.UsageError` if they are not installed.
"""

from typing import TYPE_CHECKING, Any

from taskvec_formats import Checkpoint, FormatError, SparseTensor

from . import errors
from .analysis.overlap import Overlap
from .api import (
    MergedModel,
    apply,
    attach,
    attached,
    compose,
    diff,
    evaluate,
    evaluate_grid,
    load,
    merge,
    overlap,
    pack,
    search_merge,
    sparse_finetune,
    train,
    verify,
    write_model,
)
from .applying.apply import Applied
from .errors import TaskvecError
from .hub import open_checkpoint
from .packages import require
from .vectors.vector import TaskVector
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .evaluation.evaluate import Evaluation
    from .evaluation.grid import EvaluationGrid
    from .hub.push import Pushed
    from .models.attach import Attachment
    from .models.sparse_model import SparseModel
    from .models.switcher import TaskSwitcher
    from .search.search import SearchResult
    from .training.options import TrainingOptions
    from .training.result import TrainingResult

# name -> module of the types that are imported on demand: they take a tenth of a second or load torch
_ON_DEMAND = {
    "Attachment": "models.attach",
    "Evaluation": "evaluation.evaluate",
    "EvaluationGrid": "evaluation.grid",
    "Pushed": "hub.push",
    "SearchResult": "search.search",
    "SparseModel": "models.sparse_model",
    "TaskSwitcher": "models.switcher",
    "TrainingOptions": "training.options",
    "TrainingResult": "training.result",
}
_WITH_TORCH = {"Attachment", "Evaluation", "EvaluationGrid", "SparseModel", "TaskSwitcher"}

__all__ = [
    "Applied",
    "Attachment",
    "Checkpoint",
    "Evaluation",
    "EvaluationGrid",
    "FormatError",
    "MergedModel",
    "Overlap",
    "Pushed",
    "SearchResult",
    "SparseModel",
    "SparseTensor",
    "TaskSwitcher",
    "TaskVector",
    "TaskvecError",
    "TrainingOptions",
    "TrainingResult",
    "apply",
    "attach",
    "attached",
    "compose",
    "diff",
    "errors",
    "evaluate",
    "evaluate_grid",
    "load",
    "merge",
    "open_checkpoint",
    "overlap",
    "pack",
    "search_merge",
    "sparse_finetune",
    "train",
    "verify",
    "write_model",
]


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        from importlib import import_module

        if name in _WITH_TORCH:
            require(f"`taskvec.{name}`", "train")
        return getattr(import_module(f".{_ON_DEMAND[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
