"""Several vectors on one base, as they are evaluated."""

from __future__ import annotations

from collections.abc import Sequence

from taskvec_formats import Checkpoint

from ..merging.combine import merge
from ..merging.tokenizers import compare_tokenizers
from ..reporting.progress import Progress, silent
from ..vectors.vector import TaskVector


def merged_on(
    vectors: Sequence[TaskVector], base: Checkpoint, progress: Progress = silent
) -> tuple[TaskVector | None, tuple[str, ...]]:
    """Merge vectors with the method "auto", with the checks of a merge that is written as a model.

    Args:
        vectors: The vectors. A single one is not merged.
        base: The model that they are evaluated on.
        progress: Called for every tensor that is checked.

    Returns:
        The vector, or None if there are none, and sentences about the merge.

    Raises:
        MergeError: The tokenizers of the vectors differ, or their changes cannot be added.
        UsageError, BaseMismatchError, KindError, FormatError: As in `merge`.
    """
    if len(vectors) < 2:
        return next(iter(vectors), None), ()
    notes = compare_tokenizers(vectors, base, "the base's is used").notes
    merged = merge(vectors, progress=progress, base=base)
    return merged, (*merged.provenance["notes"], *notes)
