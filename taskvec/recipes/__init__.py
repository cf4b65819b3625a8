"""Merge files of mergekit, which are read, checked, and computed tensor by tensor."""

from __future__ import annotations

import os
from pathlib import Path

from ..applying.output import Output
from ..arguments import path_of, truth
from ..destination import check_file, part_of
from ..errors import UsageError
from ..reporting import bars
from ..reporting.progress import Progress
from ..vectors.vector import check_codec
from .recipe import Recipe
from .writing import RecipeMerge, Written

__all__ = ["Recipe", "RecipeMerge", "Written", "merge_recipe"]


def merge_recipe(
    recipe: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    shard_size: int | None = None,
    codec: str = "auto",
    force: bool = False,
    resume: bool = True,
    progress: bool | Progress = False,
) -> Written:
    """Merge the models of a merge file.

    Args:
        recipe: The path of the merge file. Relative paths in it start from the working directory.
        out: The model folder to write; or the `.lota` file, if the name ends in `.lota`.
        dtype: For a folder, the dtype of the tensors instead of that of the file: "float32", "bfloat16" or "float16".
        shard_size: For a folder, the largest size of a shard in bytes. None keeps the shards of the base.
        codec: For a `.lota` file, as in `TaskVector.save`.
        force: Whether to replace an existing output.
        resume: For a folder, whether to continue from `out`.part, which an interrupted merge leaves.
        progress: True shows progress bars. A callable receives (stage, done, total, note) at every step.

    Returns:
        The provenance of the result, and notes on settings without effect and on files that differ.

    Raises:
        UsageError: The file asks for something that is not supported, or names files that do not exist; or an argument
            has no effect on this kind of output.
        MergeError: The models cannot be merged.
        OutputExistsError: `out` exists and `force` is False.
        ResumeError: `out`.part is in use, or belongs to another merge.
        BaseMismatchError, AdapterError, HubError, SizeError, DTypeError, ResultError, FormatError: As in `apply` and
            `taskvec.interop.from_peft`.
    """
    check_codec(codec)
    output, path = Output(shard_size, dtype), path_of("out", out)
    to_file = path.suffix == ".lota"
    if to_file and (dtype is not None or shard_size is not None):
        raise UsageError(f"`{'shard_size' if dtype is None else 'dtype'}` is for a model folder, not for a .lota file")
    if not to_file and codec != "auto":
        raise UsageError("`codec` is for a .lota file, not for a model folder")
    read = Recipe.read(path_of("recipe", recipe))
    with bars.shown(progress) as report:
        merge = RecipeMerge(read, read.open_start(), report)
        if to_file:
            file = check_file(path, force=truth("force", force), inputs=[read.path])
            return merge.write_file(file, codec, force=force)
        work, resume = part_of(Path(path)), truth("resume", resume)
        return merge.write_folder(path, output, force=truth("force", force), work=work, resume=resume)
