"""A merge as a complete model folder, and what its parents' tokenizers have to say to it."""

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
from .tokenizers import compare_tokenizers


def write_model(
    merged: TaskVector,
    parents: Sequence[TaskVector],
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

    merged: what `merge` made of parents. output: shards and dtype. force, work, resume: as in `apply`.
    Returns sentences about files in which the parents differ, and about what of the base's folder is not written.
    Raises MergeError where the parents' tokenizers differ, and the errors of `apply`.
    """
    out = check_folder(out, force=force, inputs=inputs_of(merged, base))
    agreement = compare_tokenizers(parents, base)
    output = replace(output, card=model_card(out.name, merged), carried=tuple(agreement.carried))
    applied = apply(
        merged, base, out, progress, output, force=force, work=work, record=merged.provenance, resume=resume
    )
    left_out = f"not carried from {base.name}: {', '.join(applied.left_out)}"
    return [*agreement.notes, *([left_out] if applied.left_out else [])]
