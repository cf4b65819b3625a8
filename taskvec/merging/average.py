"""The weighted average of whole models, Σ wᵢ·mᵢ / Σ wᵢ, bit for bit as mergekit's `linear` computes it.

In exact arithmetic it equals the base plus the average of the task vectors. In f32 the two may differ in the last bit,
even in tensors that are equal in all models.
Source: Wortsman et al., "Model soups", arXiv 2203.05482.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from taskvec_formats import Change, Checkpoint, Form, Header, Identity, TensorSpec
from taskvec_formats.checkpoint import short
from taskvec_formats.dtypes import DTYPES, BitArray, DType
from taskvec_formats.forms import Bits, take_for

from ..applying.output import TARGETS
from ..applying.rounding import Values, round_to
from ..applying.verified import mismatch
from ..errors import MergeError, UsageError
from ..reporting.progress import Progress, silent
from ..reporting.throughput import hashed
from ..vectors.delta import apply_range, diff_range
from ..vectors.lineage import joined
from ..vectors.promotion import WidenedEntries
from ..vectors.source import inputs_of
from ..vectors.sums import common_specs
from ..vectors.vector import TaskVector
from .combine import provenance_of
from .measured import depth_of, measured_from
from .notes import notes_on
from .requests import by_vector, weights_for
from .settings import Setting


def average(
    vectors: Sequence[TaskVector],
    base: Checkpoint,
    weights: Sequence[Setting] | None = None,
    progress: Progress = silent,
    *,
    dtype: str | None = None,
    out_dtype: str | None = None,
) -> TaskVector:
    """Compute the vector from the base to the weighted average of several models, lazily.

    Args:
        vectors: One per model, all from this base. A vector without tensors stands for the base itself.
        base: The checkpoint that the vectors start from.
        weights: One factor per model. None means 1 each.
        progress: Called while the base is read.
        dtype: "float32", "bfloat16" or "float16": the dtype to which the weights of all models are rounded before
            averaging, and the average afterwards. None takes, for each tensor, the narrowest dtype that holds those of
            all models.
        out_dtype: The dtype to which the average is rounded last. None leaves it unchanged.

    Returns:
        A vector that, applied to the base, gives the average exactly.

    Raises:
        MergeError: The models do not have the same tensors, they differ in a tensor that is not floating point, or the
            weights of a tensor add up to 0.
        BaseMismatchError: A vector has a different base.
        UsageError: There is no vector, or the number of weights is not the number of vectors.
    """
    if not vectors:
        raise UsageError("nothing to merge: give at least one model")
    factors = weights_for(weights, vectors)
    depth = depth_of(vectors, base)
    measured = [measured_from(base, vector, progress) for vector in vectors]
    held = common_specs([(vector.name, vector.header, vector.specs) for vector in measured])
    digests = hashed(base, "base", progress)
    for vector in measured:
        if vector.base.fingerprint != base.fingerprint:
            raise mismatch(vector, base, "its fingerprint is another")
    within: dict[str, DType] = {}
    specs = {}
    for name, info in base.tensors.items():
        if info.dtype.additive:
            spec = held.get(name) or TensorSpec.like(name, info.form, short(digests[name]))
            within[name] = DTYPES[TARGETS[dtype]] if dtype else spec.dtype
            specs[name] = replace(spec, dtype=DTYPES[TARGETS[out_dtype]] if out_dtype else within[name])
    source = _Average(measured, base, by_vector("weight", factors, measured, specs, depth), specs, within)
    provenance = provenance_of(
        vectors,
        depth,
        specs,
        method="average",
        reason="asked for",
        weights=factors,
        lam=1.0,
        options={name: value for name, value in (("dtype", dtype), ("out_dtype", out_dtype)) if value},
        notes=notes_on(vectors, factors, depth, base),
    )
    header = Header("vector", Identity(base.name, base.fingerprint), None, tensors=(), provenance=provenance)
    name = joined((vector.name for vector in vectors), " + ")
    return TaskVector(header, specs.values(), source, name, base, made_of=measured)


class _Average(WidenedEntries):
    """The Source of an average of models."""

    def __init__(
        self,
        vectors: Sequence[TaskVector],
        base: Checkpoint,
        weights: Sequence[Mapping[str, float]],
        specs: Mapping[str, TensorSpec],
        within: Mapping[str, DType],
    ) -> None:
        super().__init__([vector.source for vector in vectors], specs, base)
        self.by_range = all(vector.source.by_range for vector in vectors)
        self.inputs = inputs_of(*vectors, base)
        self._vectors = vectors
        self._start = base
        self._weights = weights
        self._specs = specs
        self._within = within
        self._divisors = {name: self._divisor(name) for name in specs}

    def _divisor(self, name: str) -> np.float32:
        total = np.float32(0)
        with np.errstate(all="ignore"):
            for weights in self._weights:
                total += np.float32(weights[name])
        if total == 0:
            raise MergeError(f"tensor {name!r}: the weights add up to 0, so there is no average")
        if not np.isfinite(total):
            raise MergeError(f"tensor {name!r}: the weights leave the range of f32")
        return total

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        spec, within = self._specs[name], self._within[name]
        own = self._start.bits(name, start, stop)
        total: Values = np.zeros(stop - start, within.compute)
        finite = np.ones(stop - start, bool)
        with np.errstate(all="ignore"):
            for vector, weights in zip(self._vectors, self._weights, strict=True):
                values = self._values(vector, name, start, stop, own)
                finite &= np.isfinite(values)
                # torch uses a fused multiply-add, which does not round the product
                total = (total + values.astype(np.float64) * np.float64(np.float32(weights[name]))).astype(total.dtype)
            total /= self._divisors[name]
        if not np.isfinite(total[finite]).all():
            raise MergeError(f"tensor {name!r}: the average leaves the range of f32")
        average = round_to(within, total, name)
        after = round_to(spec.dtype, average, name).view(spec.dtype.carrier)
        return diff_range(spec.dtype, self._converted(name, own, spec.dtype), after)

    def _values(self, vector: TaskVector, name: str, start: int, stop: int, base: BitArray) -> Values:
        """The weights of one model in a range of a tensor, rounded to the dtype of the average."""
        dtype, target = self._start.tensors[name].dtype, self._within[name]
        if name in vector.specs:
            dtype = vector.specs[name].dtype
            base = apply_range(dtype, self._converted(name, base, dtype), vector.change(name, start, stop))
        values = base.view(dtype.real).astype(target.compute)
        return values if dtype == target else round_to(target, values, name).astype(target.compute)

    def _converted(self, name: str, base: BitArray, dtype: DType) -> BitArray:
        """A range of a tensor of the base, converted to the dtype that a vector's deltas are added in."""
        origin = self._start.tensors[name].dtype
        return base if origin == dtype else take_for(base, Form(origin, base.shape), Form(dtype, base.shape))
