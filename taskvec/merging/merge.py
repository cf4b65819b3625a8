"""Merging task vectors, tensor by tensor, in the space of their entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from taskvec_formats import Change, Header, TensorSpec
from taskvec_formats.dtypes import BitArray

from ..errors import BaseMismatchError, KindError, MergeError, UsageError
from ..overlap import meet
from ..progress import Progress, silent
from ..vector import Entries, TaskVector, no_replacements
from .registry import METHODS, MergeFunction

AUTO = "auto"


def merge(
    vectors: Sequence[TaskVector],
    method: str = AUTO,
    weights: Sequence[float] | None = None,
    progress: Progress = silent,
) -> TaskVector:
    """Merge vectors of one base into a lazy vector; nothing is computed until a tensor is read or the result is saved.

    method: a name in METHODS, or "auto": `disjoint` where no two masks share a position, else `ties`. Which one was
        taken, and why, stands in the result's provenance under "method" and "reason".
    weights: one finite factor a vector, 1 each where left out.
    The result is a sum of f32 deltas; replacements, which make a packed vector exact to the bit, belong to one pair of
    checkpoints and do not travel, nor do side files.
    Raises UsageError for an unknown method or unfit weights, BaseMismatchError where the bases differ, KindError for a
    patch, MergeError for changes that cannot be added (integer or boolean tensors, tensors added, removed or resized).
    """
    weights = _checked(vectors, method, weights)
    provenance: dict[str, Any] = {
        "made_by": "merge",
        "weights": list(weights),
        "parents": [{"name": vector.name, **vector.provenance} for vector in vectors],
    }
    specs = _common_specs(vectors)
    if method == AUTO:
        shared = _first_meeting(vectors, specs, progress)
        method = "disjoint" if shared is None else "ties"
        reason = "no two masks share a position" if shared is None else f"the masks meet, first in {shared}"
    else:
        reason = "asked for"
    provenance |= {"method": method, "reason": reason}
    source = _Merge(vectors, METHODS[method].function, weights, specs)
    header = Header("vector", vectors[0].base, None, tensors=(), provenance=provenance)
    return TaskVector(header, specs.values(), source)


class _Merge(Entries):
    """The Source of a merged vector."""

    def __init__(
        self,
        vectors: Sequence[TaskVector],
        function: MergeFunction,
        weights: Sequence[float],
        specs: dict[str, TensorSpec],
    ) -> None:
        self._vectors = vectors
        self._function = function
        self._weights = weights
        self._specs = specs

    def change(self, name: str, start: int, stop: int, base: BitArray | None = None) -> Change:
        pairs = zip(self._vectors, self._weights, strict=True)
        held = [(vector.change(name, start, stop).delta, weight) for vector, weight in pairs if name in vector.specs]
        try:
            merged = self._function([tensor for tensor, _ in held], [weight for _, weight in held])
        except MergeError as error:
            raise MergeError(f"tensor {name!r}: {error}") from None
        return Change(merged, no_replacements(self._specs[name], stop - start))


def _checked(vectors: Sequence[TaskVector], method: str, weights: Sequence[float] | None) -> Sequence[float]:
    if not vectors:
        raise UsageError("nothing to merge: give at least one vector")
    if method not in METHODS and method != AUTO:
        raise UsageError(f"no merge method {method!r}; there are {', '.join([AUTO, *METHODS])}")
    if weights is None:
        return [1.0] * len(vectors)
    if len(weights) != len(vectors):
        raise UsageError(f"{len(weights)} weights for {len(vectors)} vectors")
    for weight in weights:
        if not abs(weight) < float("inf"):
            raise UsageError(f"a weight must be a finite number, found {weight}")
    return [float(weight) for weight in weights]


def _common_specs(vectors: Sequence[TaskVector]) -> dict[str, TensorSpec]:
    first = vectors[0].base
    specs: dict[str, TensorSpec] = {}
    for vector in vectors:
        if vector.base.fingerprint != first.fingerprint:
            raise BaseMismatchError(
                f"the vectors have different bases: {first.name} ({first.fingerprint[:12]}) and "
                f"{vector.base.name} ({vector.base.fingerprint[:12]})"
            )
        if vector.kind != "vector":
            raise KindError(f"{vector.name} is a {vector.kind}: it holds new bits, not deltas; pack a vector to merge")
        if vector.header.removed:
            raise MergeError(f"{vector.name} removes tensor {vector.header.removed[0]!r}: that cannot be added up")
        for name, spec in vector.specs.items():
            if not spec.dtype.additive:
                raise MergeError(f"{vector.name}: tensor {name!r} is {spec.dtype.name}: its changes cannot be added")
            if spec.origin != spec.form:
                origin = f"is {spec.origin} in the base" if spec.origin else "is not in the base"
                raise MergeError(f"{vector.name}: tensor {name!r} is {spec.form} but {origin}: that cannot be added up")
            known = specs.get(name, spec)
            if known.form != spec.form:
                raise BaseMismatchError(f"tensor {name!r} is {known.form} in one vector and {spec.form} in another")
            specs[name] = replace(known, eligible=known.eligible or spec.eligible, blocks=())
    return dict(sorted(specs.items()))


def _first_meeting(vectors: Sequence[TaskVector], specs: dict[str, TensorSpec], progress: Progress) -> str | None:
    """The first tensor in which two masks share a position, or None."""
    for done, name in enumerate(specs):
        progress("comparing masks", done, len(specs), name)
        tensors = [vector[name] for vector in vectors if name in vector.specs]
        if any(meet(a, b) for a, b in combinations(tensors, 2)):
            progress("comparing masks", len(specs), len(specs), "")
            return name
    progress("comparing masks", len(specs), len(specs), "")
    return None
