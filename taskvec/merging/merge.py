"""Merging task vectors, tensor by tensor, in the space of their entries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import combinations
from threading import Lock
from typing import Any, TypeAlias

import numpy as np

from taskvec_formats import Change, Header, SparseTensor, TensorSpec
from taskvec_formats.dtypes import BitArray

from ..align import align, merging
from ..arguments import instances
from ..errors import MergeError, UsageError
from ..lineage import joined, lineage
from ..overlap import meet
from ..progress import Progress, silent
from ..source import Entries, no_replacements
from ..sums import common_specs
from ..vector import TaskVector
from .dialects import DIALECTS
from .disjoint import POLICIES
from .pruned import RESCALES, Pruned, Request
from .registry import AUTO, Method, method_of, options_of
from .settings import Depth, Setting, described, numbers_of, resolve
from .ties import ELECTIONS, ties
from .trim import trim

_CHOICES: dict[str, Iterable[object]] = {
    "dialect": DIALECTS,
    "elect": ELECTIONS,
    "on_overlap": POLICIES,
    "rescale": (*RESCALES, None),
    "normalize": (True, False),
}
_MOST = 1 << 22  # elements of all vectors that are merged at a time: their dense sum is what is computed with
Specs: TypeAlias = Mapping[str, TensorSpec]
# of a tensor's name and a range of it: the entries that a vector brings to the merge
_Reader: TypeAlias = Callable[[str, int, int], SparseTensor]


def merge(
    vectors: Sequence[TaskVector],
    method: str = AUTO,
    weights: Sequence[Setting] | None = None,
    progress: Progress = silent,
    *,
    density: float | Sequence[Setting] | None = None,
    lam: Setting = 1.0,
    **options: Any,
) -> TaskVector:
    """Merge vectors of one base into a lazy vector; nothing is computed until a tensor is read or the result is saved.

    method: a name in METHODS, or "auto": `disjoint` where no two masks share a position, else `ties`. Which one was
        taken, and why, stands in the result's provenance under "method" and "reason".
    weights: one factor a vector, 1 each where left out: a number, a gradient over the layers or rules by name.
    density: the share of its eligible weights that a vector keeps: a number for all, or one setting a vector.
    lam: λ, a factor of the whole.
    options: of the method (`METHODS[name].options`, docs/merging.md).
    Settings that have no effect on these vectors are named in the provenance under "notes".
    The result is a sum of f32 deltas; replacements, which make a packed vector exact to the bit, belong to one pair of
    checkpoints and do not travel, nor do side files.
    Raises UsageError for an unknown method and for settings that it does not have, BaseMismatchError where the bases
    differ, KindError for a patch, MergeError for changes that cannot be added (integer or boolean tensors, tensors
    added, removed or resized).
    """
    instances("vectors", vectors, TaskVector)
    if not vectors:
        raise UsageError("nothing to merge: give at least one vector")
    factors = [1.0] * len(vectors) if weights is None else _one_each("weights", weights, len(vectors))
    numbers_of(lam)
    specs = common_specs([(vector.name, vector.header, vector.specs) for vector in vectors])
    reason = "asked for"
    if method == AUTO:
        if density is not None or options:
            raise UsageError(f"{AUTO} chooses the method, which then has no options: name one to give it some")
        shared = _first_meeting(vectors, specs, progress)
        method = "disjoint" if shared is None else "ties"
        reason = "no two masks share a position" if shared is None else f"the masks meet, first in {shared}"
    chosen = method_of(method)
    effective = _effective(chosen, options, density)
    source = _Merge(vectors, chosen, factors, _densities(chosen, density, len(vectors)), lam, effective, specs)
    provenance: dict[str, Any] = {
        "made_by": "merge",
        "method": method,
        "reason": reason,
        "weights": [described(weight) for weight in factors],
        "lambda": described(lam),
        "options": effective if density is None else {"density": described(density), **effective},
        "notes": source.notes(progress),
        **lineage(vectors),
    }
    header = Header("vector", vectors[0].base, None, tensors=(), provenance=provenance)
    return TaskVector(
        header, specs.values(), source, joined((vector.name for vector in vectors), " + "), made_of=vectors
    )


class _Merge(Entries):
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
    ) -> None:
        self._vectors = vectors
        self._method = method
        self._specs = specs
        self._options = {**options, **method.fixed}
        depth = Depth(specs)
        self._weights = [_by_tensor("weight", weight, specs, depth) for weight in weights]
        self._densities = [_by_tensor("density", density, specs, depth) for density in densities]
        self._lam = _by_tensor("lambda", lam, specs, depth)
        chosen = {name: self._options[name] for name in options_of(method.combine)}
        self._combine = partial(method.combine, **chosen)
        prunes = method.prune is not None and any(share < 1 for shares in self._densities for share in shares.values())
        self.by_range = not (prunes or method.whole) and all(vector.source.by_range for vector in vectors)
        self._readers = [self._reader(number) for number in range(len(vectors))]
        self._lock = Lock()
        self._whole = lru_cache(maxsize=1)(self._merged)

    def _reader(self, number: int) -> _Reader:
        vector, prune, options = self._vectors[number], self._method.prune, self._options
        if prune is None:
            return lambda name, start, stop: vector.change(name, start, stop).delta
        dialect = DIALECTS[options["dialect"]]
        request = Request(vector, number, self._densities[number].__getitem__, dialect)
        keep = prune(request, **{name: options[name] for name in options_of(prune)})
        return Pruned(request, keep, options["rescale"] or dialect.rescale)

    def change(self, name: str, start: int, stop: int, base: BitArray | None = None) -> Change:
        if self._method.whole:
            with self._lock:
                merged = self._whole(name, 0, self._specs[name].size).within(start, stop)
        else:
            merged = self._merged(name, start, stop)
        return Change(merged, no_replacements(self._specs[name], stop - start))

    def _merged(self, name: str, start: int, stop: int) -> SparseTensor:
        nothing = SparseTensor.empty((stop - start,))
        held = [
            read(name, start, stop) if name in vector.specs else nothing
            for vector, read in zip(self._vectors, self._readers, strict=True)
        ]
        step = max(1, stop - start if self._method.whole else _MOST // len(held))
        merged = []
        for low in range(0, stop - start, step):
            high = min(low + step, stop - start)
            merged.append((low, self._combined(name, [tensor.within(low, high) for tensor in held])))
        return SparseTensor.joined(merged, 0, stop - start, np.float32)

    def _combined(self, name: str, held: Sequence[SparseTensor]) -> SparseTensor:
        lam = self._lam[name]
        with merging(name):
            merged = self._combine(align(held, [weights[name] for weights in self._weights]))
            if lam == 1:
                return merged
            scaled = merged.values * np.float32(lam)
            if not np.isfinite(scaled).all():
                raise MergeError(f"λ = {lam:g} leads out of the range of f32")
            return merged.holding(scaled)

    def notes(self, progress: Progress) -> list[str]:
        """Sentences about settings without effect on these vectors."""
        return [*self._untrimmed(), *self._divided_out(progress)]

    def _untrimmed(self) -> list[str]:
        if self._method.prune is not trim:
            return []
        found = []
        rules = DIALECTS[self._options["dialect"]]
        for vector, densities in zip(self._vectors, self._densities, strict=True):
            asked = sorted({densities[name] for name in vector.specs})
            # how much is in a vector that was not stored yet is not known
            stored = all(spec.blocks or not spec.size for spec in vector.specs.values())
            if not asked or asked == [1.0] or not stored:
                continue
            specs = vector.specs.values()
            own = sum(spec.entries for spec in specs)
            said = f"{asked[0]:g}" if len(asked) == 1 else f"{asked[0]:g} to {asked[-1]:g}"
            if rules.whole_vector:
                idle = rules.entries(asked[0], vector.eligible) >= own
            else:
                idle = all(rules.entries(densities[spec.name], spec.size) >= spec.entries for spec in specs)
            if idle:
                share = own / vector.eligible if vector.eligible else 0.0
                found.append(f"density {said} trims nothing from {vector.name}, whose own density is {share:.2%}")
        return found

    def _divided_out(self, progress: Progress) -> list[str]:
        divides = self._method.combine is ties and self._options["normalize"]
        if not (divides and DIALECTS[self._options["dialect"]].by_weight):
            return []
        if all(weight == 1 for weights in self._weights for weight in weights.values()):
            return []
        if _first_meeting(self._vectors, self._specs, progress) is not None:
            return []
        return ["no two masks share a position, so normalizing divides every weight out again: they have no effect"]


def _effective(method: Method, options: Mapping[str, Any], density: object) -> dict[str, Any]:
    """Every option of a method as it is going to be. Raises UsageError for those that it does not have."""
    known = method.options
    if density is not None and method.prune is None:
        raise UsageError(f"{method.name} has no density: it prunes nothing")
    for name, value in options.items():
        if name not in known or name == "density":
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise UsageError(f"{method.name} has no option {name.replace('_', '-')!r}; {has}")
        if name in _CHOICES and value not in list(_CHOICES[name]):
            choices = ", ".join(str(choice) for choice in _CHOICES[name] if choice is not None)
            raise UsageError(f"{name.replace('_', '-')} is one of {choices}, found {value!r}")
    (gamma,) = numbers_of([options.get("gamma", 0.0)])
    if not 0 <= gamma < 1:
        raise UsageError(f"gamma is a share of the weights, at least 0 and below 1, found {gamma:g}")
    if not isinstance(options.get("seed", 0), int):
        raise UsageError(f"a seed is a whole number, found {options['seed']!r}")
    defaults = {name: default for name, default in known.items() if name != "density"}
    dialect = options.get("dialect", "reference")
    return {**defaults, **method.dialects.get(dialect, {}), **options}


def _densities(method: Method, density: float | Sequence[Setting] | None, count: int) -> Sequence[Setting]:
    if method.prune is None:
        return [1.0] * count
    if density is None:
        density = method.density
    if density is None:
        raise UsageError(f"{method.name} needs a density")
    densities = _one_each("densities", density, count) if isinstance(density, Sequence) else [density] * count
    for each in densities:
        for number in numbers_of(each):
            if not 0 <= number <= 1:
                raise UsageError(f"a density is a share of the weights, between 0 and 1, found {number:g}")
    return densities


def _one_each(what: str, settings: Sequence[Setting], count: int) -> Sequence[Setting]:
    if len(settings) != count:
        raise UsageError(f"{len(settings)} {what} for {count} vectors")
    for setting in settings:
        numbers_of(setting)
    return settings


def _by_tensor(what: str, setting: Setting, specs: Specs, depth: Depth) -> dict[str, float]:
    numbers = {}
    for name in specs:
        number = resolve(setting, name, depth(name))
        if number is None:
            raise UsageError(f"no rule gives tensor {name!r} a {what}: end the rules with one for all tensors")
        numbers[name] = number
    return numbers


def _first_meeting(vectors: Sequence[TaskVector], specs: Specs, progress: Progress) -> str | None:
    """The first tensor in which two masks share a position, or None."""
    for done, name in enumerate(specs):
        progress("comparing masks", done, len(specs), name)
        tensors = [vector[name] for vector in vectors if name in vector.specs]
        if any(meet(a, b) for a, b in combinations(tensors, 2)):
            progress("comparing masks", len(specs), len(specs), "")
            return name
    progress("comparing masks", len(specs), len(specs), "")
    return None
