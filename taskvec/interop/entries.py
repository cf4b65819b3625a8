"""Vectors whose entries another format provides, and vectors whose deltas another format can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from taskvec_formats import Change, Checkpoint, Form, SparseTensor
from taskvec_formats.forms import Bits

from ..errors import ConversionError, KindError
from ..reporting.progress import Progress, silent
from ..vectors.source import DeltaSource, Source, WholeTensors
from ..vectors.vector import TaskVector, header_of, specs_of


class WholeEntries(DeltaSource):
    """A Source of deltas that are read one whole tensor at a time.

    Args:
        read: Returns the deltas of a tensor, f32 with a flat shape.
        forms: Tensor name -> Form in the base.
        inputs: The files that it reads.
    """

    by_range = False

    def __init__(self, read: Callable[[str], SparseTensor], forms: Mapping[str, Form], inputs: Sequence[Path]) -> None:
        self.inputs = inputs
        self._forms = forms
        self._read = read
        self._whole = WholeTensors(self._change)

    def _change(self, name: str) -> Change:
        form = self._forms[name]
        return Change(self._read(name), SparseTensor.empty((form.size,), form.dtype.carrier))

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        return self._whole.change(name, start, stop)


def vector_from(
    base: Checkpoint,
    forms: Mapping[str, Form],
    source: Source,
    path: Path,
    sparsity: float | None = None,
    progress: Progress = silent,
) -> TaskVector:
    """Return the vector of entries that another format provides.

    Args:
        base: The base.
        forms: Tensor name -> Form in the base.
        source: The source of the entries.
        path: The file or folder that they come from, for the provenance.
        sparsity: None keeps every entry. A number s in (0, 1) keeps the k = round((1 − s)·N) entries of largest
            magnitude, where N is the number of weights in the tensors.
        progress: Called while the base is hashed.

    Raises:
        ConversionError: There are no tensors.
        UsageError: The sparsity is outside (0, 1).
        MaskError: The sparsity keeps no entry.
    """
    if not forms:
        raise ConversionError(f"{path} changes nothing")
    specs = specs_of(base, forms, progress)
    made = {"made_by": "convert", "source": path.name}
    vector = TaskVector(header_of(base, specs, made), specs.values(), source, path.name, base)
    return vector if sparsity is None else vector.shrink(sparsity)


def deltas_of(vector: TaskVector) -> Iterator[str]:
    """Yield the tensors of a vector whose changes are deltas. The others have replacements only.

    Args:
        vector: The vector.

    Raises:
        ConversionError: The vector adds, removes or resizes a tensor.
        KindError: It is a patch.
    """
    if vector.kind != "vector":
        raise KindError(f"{vector.name} is a patch, which has no deltas: pack the fine-tune as a vector")
    for name, spec in vector.specs.items():
        if spec.origin != spec.form:
            raise ConversionError(f"{vector.name} adds tensor {name!r} or changes its form, which deltas cannot")
    if vector.header.removed:
        raise ConversionError(f"{vector.name} removes tensor {vector.header.removed[0]!r}, which deltas cannot")
    for name, spec in vector.specs.items():
        if spec.dtype.additive:
            yield name


def counts_of(vector: TaskVector, progress: Progress = silent) -> tuple[dict[str, int], int]:
    """Return tensor name -> number of entries, and the number of replacements of all tensors.

    Args:
        vector: The vector. Its entries are computed if it does not come from a file.
        progress: Called for every tensor that is computed.
    """
    if vector.is_stored:
        stored = vector.specs.values()
        return {spec.name: spec.entries for spec in stored}, sum(spec.replaced for spec in stored)
    counts, replaced = {}, 0
    for done, name in enumerate(vector.specs):
        progress("counting", done, len(vector.specs), name)
        change = vector.change(name)
        counts[name] = len(change.delta)
        replaced += len(change.replacements)
    return counts, replaced
