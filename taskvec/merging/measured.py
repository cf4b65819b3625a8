"""Vectors relative to the tensors of their base: the depth of each tensor, and deltas from the unrounded base."""

from __future__ import annotations

from collections.abc import Sequence

from taskvec_formats import Checkpoint

from ..applying.overlay import Patched
from ..applying.verified import check_forms
from ..reporting.progress import Progress
from ..vectors.diff import diff
from ..vectors.layers import counted, most, recorded
from ..vectors.promotion import is_widened, promoted, wider
from ..vectors.vector import TaskVector
from .settings import Depth


def depth_of(vectors: Sequence[TaskVector], base: Checkpoint | None) -> Depth:
    """The depth of the tensors of vectors in their base.

    Args:
        vectors: The vectors to merge.
        base: Their base, or None if it is not available.

    Raises:
        BaseMismatchError: The base lacks a tensor that a vector changes, or has it with another dtype or shape.
    """
    if base is None:
        return Depth(
            [], most(layers for vector in vectors for layers in (counted(vector.specs), recorded(vector.provenance)))
        )
    for vector in vectors:
        check_forms(vector, base)
    return Depth(base.tensors)


def measured_from(base: Checkpoint | None, vector: TaskVector, progress: Progress) -> TaskVector:
    """Recompute the deltas of a vector from the unrounded base, if they were taken from a rounded one.

    A vector from an F32 base to a BF16 model contains deltas from the base rounded to BF16. With the base they are
    computed again: BF16 weight − F32 weight.

    Args:
        base: The base, or None if it is not available.
        vector: The vector.
        progress: Called while the deltas are computed.

    Returns:
        A vector with new deltas. The vector itself if its deltas were not taken from a rounded base, if `base` is None
        or if it is a patch.
    """
    rounds = any(
        not is_widened(spec)
        and spec.origin is not None
        and spec.origin.shape == spec.shape
        and promoted(spec.origin.dtype, spec.dtype) is not None
        for spec in vector.specs.values()
    )
    if base is None or not rounds or vector.kind != "vector":
        return vector
    whole = diff(base, wider(base, Patched(base, vector)), progress=progress)
    return TaskVector(whole.header, whole.specs.values(), whole.source, vector.name, base, made_of=[vector])
