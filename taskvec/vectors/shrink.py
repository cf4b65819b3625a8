"""Reduction of a vector to its entries of largest magnitude."""

from __future__ import annotations

import numpy as np

from taskvec_formats import Change, Header, SparseTensor, TensorSpec
from taskvec_formats.forms import Bits

from ..errors import MaskError, UsageError
from .layers import counted, most, record, recorded
from .lineage import lineage
from .ranks import Ranks
from .source import DeltaSource, Source, Vector, no_replacements
from .sums import addend, common_specs
from .topk import check_sparsity, entries_for

_USE = "ranked"  # what shrinking does to changes, for error messages


def shrunk(vector: Vector, sparsity: float) -> tuple[Header, dict[str, TensorSpec], Source]:
    """Return the parts of the vector that `TaskVector.shrink` returns.

    Args:
        vector: A vector, not a patch.
        sparsity: s, the share of the eligible weights that is left without an entry.

    Returns:
        The header, the specs by tensor name, and the source of the entries.

    Raises:
        UsageError: The sparsity is outside (0, 1), or the vector has fewer entries than would be kept.
        MaskError: The sparsity keeps no entry.
        KindError: It is a patch.
        MergeError: It changes tensors that are not numeric, or adds, removes or resizes tensors.
    """
    sparsity = check_sparsity(sparsity)
    specs = common_specs([(vector.name, vector.header, vector.specs)], use=_USE)
    k = entries_for(sparsity, vector.eligible)
    if vector.is_stored and (held := sum(spec.entries for spec in vector.specs.values())) < k:
        raise UsageError(
            f"{vector.name} has {held:,} entries of {vector.eligible:,} eligible weights; a sparsity of {sparsity:g} "
            f"would keep {k:,}"
        )
    layers = most([counted(vector.specs), recorded(vector.provenance)])
    provenance = {"made_by": "shrink", "sparsity": sparsity, **lineage([vector]), **record(specs, layers)}
    return Header("vector", vector.base, None, tensors=(), provenance=provenance), specs, _Shrunk(vector, k)


class _Shrunk(DeltaSource):
    """The Source of the k largest entries of a vector.

    `change` raises MaskError if the vector comes from a file and fewer than k of its entries are non-zero.
    """

    by_range = False  # the selection is shared by all ranges

    def __init__(self, vector: Vector, k: int) -> None:
        self._vector = vector
        self._ranks = Ranks(vector, list(vector.specs), k, at_most=not vector.is_stored)
        self.inputs = vector.inputs

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        spec, blocks = self._vector.specs[name], []
        for first, end in spec.form.blocks_of(start, stop):
            block = addend(self._vector.name, spec, self._vector.change(name, first, end), use=_USE)
            try:
                kept = self._ranks.largest(name, first, block)
            except MaskError as error:
                raise MaskError(f"{self._vector.name}: {error}") from None
            blocks.append((first, block.take(kept)))
        return Change(SparseTensor.concat(blocks, start, stop, np.float32), no_replacements(spec, stop - start))
