"""Merging of task vectors: computed lazily, tensor by tensor, from their entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from taskvec_formats import Change, Checkpoint, Header, SparseTensor, TensorSpec
from taskvec_formats.errors import StreamError
from taskvec_formats.forms import Bits

from ..applying.verified import check_forms
from ..arguments import instance, instances
from ..errors import MergeError, UsageError
from ..reporting.progress import Progress, silent
from ..vectors.align import Array, align, merging, tensors_on
from ..vectors.layers import record
from ..vectors.lineage import joined, lineage
from ..vectors.promotion import WidenedEntries
from ..vectors.source import WholeTensors, inputs_of, no_replacements
from ..vectors.sums import addend, common_specs
from ..vectors.vector import TaskVector
from .bases import check_bases
from .measured import depth_of, measured_from
from .methods.dialects import DIALECTS
from .methods.options import options_of
from .methods.pruning import Pruned, Request
from .methods.ties import ties
from .narrow import dtypes_of
from .notes import divided_out, first_meeting, notes_on
from .registry import AUTO, BUILT_IN, Method, method_of
from .requests import (
    by_tensor,
    by_vector,
    check_count,
    check_lambda,
    check_weights,
    densities_for,
    listed,
    options_for,
    refuse_options,
    weights_for,
)
from .settings import Depth, Setting, described

_MOST = 1 << 22  # elements of all vectors together that are merged at a time, which bounds the memory
Specs: TypeAlias = Mapping[str, TensorSpec]
# (tensor name, start, stop) -> the entries of one vector, after pruning
_Reader: TypeAlias = Callable[[str, int, int], SparseTensor]


def merge(
    vectors: Sequence[TaskVector],
    method: str = AUTO,
    weights: Sequence[Setting] | None = None,
    progress: Progress = silent,
    *,
    density: float | Sequence[Setting] | None = None,
    lam: Setting = 1.0,
    base: Checkpoint | None = None,
    device: str | None = None,
    **options: Any,
) -> TaskVector:
    """Merge vectors of one base into a lazy vector. Entries are computed when a tensor is read or the result is saved.

    Vectors that `in_dtypes` rounded are merged in these dtypes, the other ones in f32.

    The result consists of f32 deltas. Replacements, which make a packed vector exact to the bit, are valid for one pair
    of checkpoints only. They are dropped, and so are side files.

    Args:
        vectors: The vectors, in the order in which they are added.
        method: A name in METHODS, or "auto": `disjoint` if no two masks share a position, else `ties`.
        weights: One factor per vector: a number, a gradient over the layers or rules by tensor name. None means 1 each.
        progress: Called while masks are compared and the base is read.
        density: The share of its eligible weights that each vector keeps: a number for all, or one setting per vector.
        lam: λ, a factor of the result.
        base: The base, if available. Gradients are then read over its layers. Without it they are read over the layers
            of the vectors, or over the number of layers that their provenance records if it is larger.
        device: The device on which the vectors are combined, as torch tensors; a name as in `device_of`. None combines
            them with numpy. On the CPU, the results are the same to the bit.
        **options: Options of the method (`METHODS[name].options`, docs/merging.md).

    Returns:
        A lazy vector. Its provenance contains the chosen method ("method"), the reason for the choice ("reason") and
        sentences about settings that have no effect on these vectors ("notes").

    Raises:
        UsageError: There is no such method or device, or the method does not accept a setting.
        BaseMismatchError: The vectors have different bases, or `base` lacks a tensor that they change.
        KindError: One of the vectors is a patch.
        MergeError: The changes cannot be added: those of integer or boolean tensors, or tensors that are added, removed
            or resized. Reading or saving the result also raises it, for weights that became NaN or infinite, for
            positions that several vectors of a `disjoint` merge contain, and for a method that returns no valid result.
    """
    instances("vectors", vectors, TaskVector)
    instance("method", method, str)
    if not vectors:
        raise UsageError("nothing to merge: give at least one vector")
    check_bases(vectors)
    if base is not None:
        for vector in vectors:
            check_forms(vector, base)
    convert = None if device is None else tensors_on(device)
    factors, density = weights_for(weights, vectors), listed(density)
    check_lambda(lam)
    depth = depth_of(vectors, base)
    measured = [measured_from(base, vector, progress) for vector in vectors]
    specs = common_specs([(vector.name, vector.header, vector.specs) for vector in measured])
    reason = "asked for"
    if method == AUTO:
        refuse_options(options, density)
        shared = first_meeting(measured, specs, progress)
        method = "disjoint" if shared is None else "ties"
        reason = "no two masks share a position" if shared is None else f"the masks meet, first in {shared}"
    chosen = method_of(method)
    effective = options_for(chosen, options, density)
    check_count(chosen, len(vectors))
    check_weights(chosen, weights)
    densities = densities_for(chosen, density, vectors)
    source = _Merge(measured, chosen, factors, densities, lam, effective, specs, depth, base, convert)
    settings = [*factors, *densities, lam]
    provenance = provenance_of(
        vectors,
        depth,
        specs,
        method=method,
        reason=reason,
        weights=factors,
        lam=lam,
        options=effective if density is None else {"density": described(density), **effective},
        notes=[*notes_on(vectors, settings, depth, base), *source.notes(progress)],
    )
    header = Header("vector", vectors[0].base, None, tensors=(), provenance=provenance)
    return TaskVector(
        header, specs.values(), source, joined((vector.name for vector in vectors), " + "), made_of=measured
    )


def provenance_of(
    vectors: Sequence[TaskVector],
    depth: Depth,
    specs: Specs,
    *,
    method: str,
    reason: str,
    weights: Sequence[Setting],
    lam: Setting,
    options: Mapping[str, Any],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The provenance of a merged vector.

    Args:
        vectors: The vectors that were merged.
        depth: The depth of each tensor, with the number of layers.
        specs: Tensor name -> spec of the result.
        method: The name of the method.
        reason: Why this method was chosen.
        weights: One weight per vector.
        lam: λ, a factor of the result.
        options: The options of the method.
        notes: Sentences about settings that have no effect.

    Returns:
        JSON values.
    """
    return {
        "made_by": "merge",
        "method": method,
        "reason": reason,
        "weights": [described(weight) for weight in weights],
        "lambda": described(lam),
        "options": options,
        "notes": list(notes),
        **lineage(vectors),
        **record(specs, depth.layers),
    }


class _Merge(WidenedEntries):
    """The Source of a merged vector."""

    def __init__(
        self,
        vectors: Sequence[TaskVector],
        method: Method,
        weights: Sequence[Setting],
        densities: Sequence[Setting],
        lam: Setting,
        options: Mapping[str, Any],
        specs: Specs,
        depth: Depth,
        base: Checkpoint | None,
        convert: Callable[[Any], Array] | None,
    ) -> None:
        super().__init__([vector.source for vector in vectors], specs, base)
        self._vectors = vectors
        self._method = method
        self._specs = specs
        self._options = {**options, **method.fixed}
        self._weights = by_vector("weight", weights, vectors, specs, depth)
        self._densities = by_vector("density", densities, vectors, specs, depth)
        self._lam = by_tensor("lambda", lam, specs, depth)
        chosen = {name: self._options[name] for name in options_of(method.combine)}
        self._combine = partial(method.combine, **chosen)
        self._convert = convert
        self._within = dtypes_of(vectors)
        self._theirs = None if method.name in BUILT_IN else method.name
        prunes = method.prune is not None and any(share < 1 for shares in self._densities for share in shares.values())
        # torch is not used in processes that were forked
        is_split = not (prunes or method.whole or convert)
        self.by_range = is_split and all(vector.source.by_range for vector in vectors)
        self.inputs = inputs_of(*vectors)
        self._requests: list[Request] = []
        self._readers = [self._reader(number) for number in range(len(vectors))]
        self._whole = WholeTensors(lambda name: self._merged(name, 0, specs[name].size))

    def _reader(self, number: int) -> _Reader:
        vector, prune, options = self._vectors[number], self._method.prune, self._options
        if prune is None:
            return lambda name, start, stop: addend(vector.name, vector.specs[name], vector.change(name, start, stop))
        dialect = DIALECTS[options["dialect"]]
        request = Request(vector, number, self._densities[number].__getitem__, dialect, self._within.get)
        self._requests.append(request)
        keep = prune(request, **{name: options[name] for name in options_of(prune)})
        return Pruned(request, keep, options["rescale"] or dialect.rescale)

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        return (self._whole.change if self._method.whole else self._merged)(name, start, stop)

    def _merged(self, name: str, start: int, stop: int) -> Change:
        nothing = SparseTensor.empty((stop - start,))
        held = [
            read(name, start, stop) if name in vector.specs else nothing
            for vector, read in zip(self._vectors, self._readers, strict=True)
        ]
        step = max(1, stop - start if self._method.whole else _MOST // len(held))
        merged = []
        for low in range(0, stop - start, step):
            high = min(low + step, stop - start)
            merged.append((low, self._combined(name, [tensor.slice_range(low, high) for tensor in held])))
        delta = SparseTensor.concat(merged, 0, stop - start, np.float32)
        return Change(delta, no_replacements(self._specs[name], stop - start))

    def _combined(self, name: str, held: Sequence[SparseTensor]) -> SparseTensor:
        lam = self._lam[name]
        with merging(name):
            weights = [weights[name] for weights in self._weights]
            aligned = align(held, weights, self._convert, method=self._theirs, dtype=self._within.get(name))
            try:
                merged = aligned.checked(self._combine(aligned))
            except StreamError as error:
                raise MergeError(f"the method {self._method.name}: the result is no valid tensor: {error}") from None
            if lam == 1:
                return merged
            scaled = aligned.rounded(merged.values * np.float32(lam))
            if not np.isfinite(scaled).all():
                raise MergeError(f"the values times λ = {lam:g} leave the range of f32")
            return merged.with_values(scaled)

    def notes(self, progress: Progress) -> list[str]:
        """Sentences about settings that have no effect on these vectors."""
        dialect = DIALECTS[self._options.get("dialect", "reference")]
        found = [note for request in self._requests for note in request.notes]
        if self._method.combine is ties and self._options["normalize"] and dialect.by_weight:
            found += divided_out(self._vectors, self._weights, self._specs, progress)
        return found
