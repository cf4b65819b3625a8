"""Vectors beside their base: how deep their tensors lie in it, and their deltas from its own values."""

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
    """How deep the tensors of vectors lie in their base, at hand or not.

    Raises:
        BaseMismatchError: The base lacks a tensor that a vector changes, or has it in another form.
    """
    if base is None:
        return Depth(
            [], most(layers for vector in vectors for layers in (counted(vector.specs), recorded(vector.provenance)))
        )
    for vector in vectors:
        check_forms(vector, base)
    return Depth(base.tensors)


def measured_from(base: Checkpoint | None, vector: TaskVector, progress: Progress) -> TaskVector:
    """The vector; or, where it is measured from base tensors that were rounded to its dtype, one that is not.

    A vector from an F32 base to a BF16 model holds what is to be added to the base rounded to BF16. Beside the base it
    is measured anew: BF16 weight minus F32 weight.
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
