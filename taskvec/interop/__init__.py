"""Bridges to the formats of other programs: adapters of peft.

The functions take paths, Hub ids and open objects, as those of `taskvec` do.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from taskvec_formats import Checkpoint, Kind

from ..arguments import path_of, truth
from ..destination import check_folder
from ..hub import open_model
from ..packages import require
from ..reporting import bars
from ..reporting.progress import Progress
from ..vectors.vector import TaskVector
from .names import check_peft

if TYPE_CHECKING:
    from .shira import Shira

__all__ = ["from_peft", "to_shira"]


def from_peft(
    adapter: str | os.PathLike[str],
    base: Checkpoint | str | os.PathLike[str],
    sparsity: float | None = None,
    *,
    kind: Kind = "vector",
    trust_remote_code: bool = False,
    progress: bool | Progress = False,
) -> TaskVector:
    """Return the vector from a base to the base with an adapter of peft merged into it.

    The result of the vector has the weights that `merge_and_unload` of peft gives in the dtypes of the base, to the
    last bit. Every kind of adapter that peft can merge is supported. The model is loaded into memory.

    Args:
        adapter: The folder of the adapter, with `adapter_config.json` and `adapter_model.safetensors`.
        base: The model that the adapter was trained on: a model folder, a Hub id or an open checkpoint.
        sparsity: None keeps every change. A number s in (0, 1) keeps the k = round((1 − s)·N) changes of largest
            magnitude, where N is the number of weights in the tensors that the adapter changes.
        kind: "vector" for deltas, "patch" for the new bits relative to the base.
        trust_remote_code: Whether Python code in the model folder may run.
        progress: True shows progress bars. A callable receives (stage, done, total, note) at every step.

    Returns:
        The vector, computed when it is read or saved. The merged model stays in memory until then.

    Raises:
        AdapterError: The adapter cannot be read, does not fit the base, or changes what the base has no tensor for.
        UsageError: A package is missing, the base is a single file, or as in `diff`.
        TrainingError, DiffError, FormatError: The model cannot be loaded, or as in `diff`.
    """
    check_peft()
    from .adapters import from_adapter

    truth("trust_remote_code", trust_remote_code)
    with bars.shown(progress) as report:
        checkpoint = open_model(base, with_code=trust_remote_code)
        folder = path_of("adapter", adapter)
        return from_adapter(folder, checkpoint, sparsity, kind, report, trust_remote_code=trust_remote_code)


def to_shira(
    vector: TaskVector | str | os.PathLike[str],
    base: Checkpoint | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: bool | Progress = False,
) -> Shira:
    """Write a vector as a SHiRA adapter (arXiv 2406.13175), which peft loads onto the base.

    Args:
        vector: The vector, or the path of a `.lota` file. It may change the weights of linear layers only.
        base: The model that it was taken from: a model folder, a Hub id or an open checkpoint.
        folder: The folder to write.
        force: Whether to replace an existing adapter.
        progress: As in `from_peft`.

    Returns:
        What was written: the r of the adapter, and the numbers of its entries, of the zeros that were added so that
        every layer has as many as r requires, and of the replacements that an adapter cannot hold.

    Raises:
        AdapterError: The vector changes a tensor that is not the weight of a linear layer, or no r fits.
        BaseMismatchError: The vector has another base.
        KindError: It is a patch.
        OutputExistsError: The folder exists and `force` is False.
        UsageError: A package is missing, or the folder cannot be written.
        TrainingError, FormatError: The model is not supported, or a file is damaged.
    """
    require("a SHiRA adapter", "train")
    from .shira import to_shira as write

    opened = vector if isinstance(vector, TaskVector) else TaskVector.open(vector)
    checkpoint = open_model(base)
    path = check_folder(folder, force=truth("force", force), inputs=(*opened.inputs, *checkpoint.inputs))
    with bars.shown(progress) as report:
        return write(opened, checkpoint, path, report, force=force)
