"""Lazy weighted sums of task vectors (Ilharco et al., arXiv 2212.04089, section 2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from taskvec_formats import Change, Header, Identity, SparseTensor, TensorSpec
from taskvec_formats.forms import Bits

from ..errors import BaseMismatchError, KindError, MergeError, UsageError
from .align import align, merging
from .promotion import WidenedEntries, is_widened, promoted
from .source import Source, inputs_of, no_replacements


@dataclass(frozen=True)
class Term:
    """A vector and its factor in a sum.

    Attributes:
        weight: The factor.
        name: The name of the vector.
        digest: The digest of the vector, which distinguishes vectors of one name.
        header: The header of the vector.
        source: The source of its entries.
        specs: Tensor name -> spec.
        depth: The number of vectors that it is computed through.
        record: Its provenance as text, which orders vectors of one digest.
    """

    weight: float
    name: str
    digest: str
    header: Header
    source: Source
    specs: Mapping[str, TensorSpec]
    depth: int
    record: str

    @property
    def base(self) -> Identity:
        """The checkpoint that the vector was taken from."""
        return self.header.base

    @property
    def provenance(self) -> dict[str, Any]:
        """How the vector was made."""
        return self.header.provenance


class Sum(WidenedEntries):
    """The Source of Σ weightᵢ·τᵢ. Entries that are zero, including those that cancel, are dropped.

    Terms are added in the order of their names, whatever the order given, so that sums commute and associate to the
    byte.

    Args:
        terms: The vectors and their factors.
        specs: The tensors of the terms together (`common_specs`).

    Raises:
        UsageError: A factor is not finite.
    """

    def __init__(self, terms: Iterable[Term], specs: dict[str, TensorSpec]) -> None:
        self.terms = sorted(terms, key=lambda term: (term.name, term.digest, term.weight, term.record))
        for term in self.terms:
            if not math.isfinite(term.weight):
                raise UsageError(f"the factor of {term.name} must be a finite number, found {term.weight}")
        self.by_range = all(term.source.by_range for term in self.terms)
        self.specs = specs
        super().__init__([term.source for term in self.terms], self.specs)
        self.inputs = inputs_of(*(term.source for term in self.terms))

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        held = [term for term in self.terms if name in term.specs]
        deltas = [addend(term.name, term.specs[name], term.source.change(name, start, stop)) for term in held]
        aligned = align(deltas, [term.weight for term in held])
        with merging(name):
            total = aligned.result(aligned.total())
        return Change(total, no_replacements(self.specs[name], stop - start))


def addend(vector: str, spec: TensorSpec, change: Change, *, use: str = "added") -> SparseTensor:
    """Return the deltas of a change that can be added to those of other vectors, without its replacements.

    Args:
        vector: The name of the vector, for errors.
        spec: The tensor, as in the vector.
        change: The vector's change of a range of the tensor.
        use: What is done to the deltas, for errors.

    Raises:
        MergeError: The vector changes a weight to NaN or infinity. This is a replacement, which the sum would lack.
    """
    values = change.replacements.values.view(spec.dtype.real)
    if not np.isfinite(values).all():
        raise MergeError(
            f"{vector}: tensor {spec.name!r} has changed weights that are NaN or infinite: they cannot be {use}"
        )
    return change.delta


def common_specs(
    vectors: Sequence[tuple[str, Header, Mapping[str, TensorSpec]]], *, use: str = "added"
) -> dict[str, TensorSpec]:
    """Return the tensors of a combination of vectors, in dtypes that represent the values of all of them.

    Args:
        vectors: (name, header, specs) of each vector.
        use: What is done to the changes, for errors.

    Returns:
        Tensor name -> spec, in the order of the names.

    Raises:
        BaseMismatchError: Bases or shapes differ.
        KindError: One of them is a patch.
        MergeError: Changes cannot be added: those of integer or boolean tensors, and tensors added, removed or resized.
    """
    first = vectors[0][1].base
    specs: dict[str, TensorSpec] = {}
    for vector, header, own in vectors:
        if header.base.fingerprint != first.fingerprint:
            raise BaseMismatchError(
                f"the vectors have different bases: {first.name} ({first.fingerprint[:12]}) and "
                f"{header.base.name} ({header.base.fingerprint[:12]})"
            )
        check_vector(vector, header)
        if header.removed:
            raise MergeError(_removal(vector, header.removed[0], own, use))
        for name, spec in own.items():
            if not spec.dtype.additive:
                raise MergeError(f"{vector}: tensor {name!r} is {spec.dtype.name}: its changes cannot be {use}")
            if not is_widened(spec):
                origin = f"is {spec.origin} in the base" if spec.origin else "is not in the base"
                raise MergeError(f"{vector}: tensor {name!r} is {spec.form} but {origin}: this change cannot be {use}")
            known = specs.get(name, spec)
            dtype = promoted(known.dtype, spec.dtype)
            if known.origin != spec.origin or dtype is None:
                raise BaseMismatchError(f"tensor {name!r} is {known.form} in one vector and {spec.form} in another")
            eligible, base = known.eligible or spec.eligible, known.base or spec.base
            specs[name] = replace(known, dtype=dtype, eligible=eligible, base=base, blocks=())
    return dict(sorted(specs.items()))


def _removal(vector: str, removed: str, specs: Mapping[str, TensorSpec], use: str) -> str:
    """Return the message for a vector that removes a tensor, which may have another name in the tuned model."""
    for name, spec in specs.items():
        if spec.origin is None:
            return (
                f"{vector} removes tensor {removed!r} and adds {name!r}: this change cannot be {use}; if tensors were "
                "renamed, save both models with one version of transformers"
            )
    return f"{vector} removes tensor {removed!r}: this change cannot be {use}"


def check_vector(name: str, header: Header) -> None:
    """Check that a header describes a vector and not a patch.

    Args:
        name: The name of the vector, for the error message.
        header: Its header.

    Raises:
        KindError: It is a patch.
    """
    if header.kind != "vector":
        raise KindError(f"{name} is a {header.kind}: it contains new bits, not deltas; use `kind=vector` instead")
