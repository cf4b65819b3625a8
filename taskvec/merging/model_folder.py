"""Writing a merge as a complete model folder, with a model card and the side files of the merged vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from taskvec_formats import Checkpoint

from ..applying.apply import apply
from ..applying.output import AS_IT_IS, Output
from ..destination import check_folder
from ..reporting.progress import Progress, silent
from ..vectors.source import inputs_of
from ..vectors.vector import TaskVector
from .card import model_card
from .tokenizers import Parent, compare_tokenizers


def write_model(
    merged: TaskVector,
    parents: Sequence[Parent],
    base: Checkpoint,
    out: str | Path,
    progress: Progress = silent,
    *,
    output: Output = AS_IT_IS,
    force: bool = False,
    work: Path | None = None,
    resume: bool = True,
) -> list[str]:
    """Write the folder `out`: the base with a merge applied, a model card, and the side files that all parents share.

    Args:
        merged: The result of `merge` for `parents`.
        parents: The vectors that were merged.
        base: The checkpoint that they start from.
        out: The model folder to write.
        progress: As in `apply`.
        output: The size of shards and the dtype.
        force: As in `apply`.
        work: As in `apply`.
        resume: As in `apply`.

    Returns:
        Sentences about files in which the parents differ, and about parts of the base's folder that are not written.

    Raises:
        MergeError: The tokenizers of the parents differ. The errors of `apply` are raised too.
    """
    out = check_folder(out, force=force, inputs=inputs_of(merged, base))
    agreement = compare_tokenizers(parents, base)
    output = replace(output, card=model_card(out.name, merged), carried=(*agreement.carried, *output.carried))
    applied = apply(
        merged, base, out, progress, output, force=force, work=work, record=merged.provenance, resume=resume
    )
    left_out = f"not carried from {base.name}: {', '.join(applied.left_out)}"
    return [*agreement.notes, *([left_out] if applied.left_out else [])]
