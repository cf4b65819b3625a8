"""The variants of a model that an evaluation compares: the base, single vectors, and their merge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from taskvec_formats import Checkpoint

from ..merging.combine import merge
from ..merging.tokenizers import compare_tokenizers
from ..reporting.progress import Progress, silent
from ..vectors.lineage import joined
from ..vectors.vector import TaskVector


@dataclass(frozen=True)
class Variant:
    """A model with some vectors.

    Attributes:
        name: The name of the vectors, joined by " + "; "base" if there are none.
        parents: The vectors.
        vector: The vector to attach: that of `parents`, or their merge; None for the base.
        notes: Sentences about the merge.
    """

    name: str
    parents: tuple[TaskVector, ...] = ()
    vector: TaskVector | None = None
    notes: tuple[str, ...] = ()

    @property
    def merged(self) -> dict[str, object] | None:
        """The provenance of the merge; None if there are fewer than two vectors."""
        return self.vector.provenance if self.vector is not None and len(self.parents) > 1 else None


def merged_on(vectors: Sequence[TaskVector], base: Checkpoint, progress: Progress = silent) -> Variant:
    """Merge vectors with the method "auto", with the checks of a merge that is written as a model.

    Args:
        vectors: The vectors. A single one is not merged.
        base: The model that they are evaluated on.
        progress: Called for every tensor that is checked.

    Raises:
        MergeError: The tokenizers of the vectors differ, or their changes cannot be added.
        UsageError, BaseMismatchError, KindError, FormatError: As in `merge`.
    """
    name = joined((vector.name for vector in vectors), " + ") if vectors else "base"
    if len(vectors) < 2:
        return Variant(name, tuple(vectors), next(iter(vectors), None))
    notes = compare_tokenizers(vectors, base, "the base's is used").notes
    merged = merge(vectors, progress=progress, base=base)
    return Variant(name, tuple(vectors), merged, (*merged.provenance["notes"], *notes))


def variants_of(
    vectors: Sequence[TaskVector], base: Checkpoint, *, each: bool, grid: bool, progress: Progress = silent
) -> list[Variant]:
    """Return the variants to evaluate.

    Args:
        vectors: The vectors.
        base: The model that they are evaluated on.
        each: Whether each vector is a variant, instead of their merge.
        grid: Whether the base, each vector and their merge are variants.
        progress: As in `merged_on`.

    Raises:
        MergeError, UsageError, BaseMismatchError, KindError, FormatError: As in `merged_on`.
    """
    names = Counter(vector.name for vector in vectors)
    alone = [
        Variant(str(vector.inputs[0]) if names[vector.name] > 1 and vector.inputs else vector.name, (vector,), vector)
        for vector in vectors
    ]
    if each:
        return alone
    whole = merged_on(vectors, base, progress)
    if not grid:
        return [whole]
    return [Variant("base"), *alone, *([whole] if len(vectors) > 1 else [])]
