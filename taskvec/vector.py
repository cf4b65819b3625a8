"""The task vector: what fine-tuning added to a base model, tensor by tensor, loaded when asked for.

Source of the notion and its arithmetic: Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from taskvec_formats import Base, LotaReader, LotaWriter, SparseTensor, TensorSpec

from .progress import Progress, silent


class Source(Protocol):
    """Where a vector's entries come from: a file, two checkpoints, a merge."""

    def delta(self, name: str) -> SparseTensor:
        """Additive entries of a tensor, values f32."""

    def exceptions(self, name: str) -> SparseTensor:
        """Bits of the exact results that base + delta does not give."""


class Memory:
    """A Source held in memory: tensor name -> entries."""

    def __init__(self, deltas: Mapping[str, SparseTensor], specs: Mapping[str, TensorSpec]) -> None:
        self._deltas = deltas
        self._specs = specs

    def delta(self, name: str) -> SparseTensor:
        return self._deltas.get(name) or SparseTensor.empty(self._specs[name].shape)

    def exceptions(self, name: str) -> SparseTensor:
        return no_exceptions(self._specs[name])


def no_exceptions(spec: TensorSpec) -> SparseTensor:
    """An empty list of exceptions for a tensor."""
    return SparseTensor.empty(spec.shape, spec.dtype.carrier)


class TaskVector(Mapping[str, SparseTensor]):
    """A lazy mapping tensor name -> SparseTensor of f32 deltas, in the order of the names.

    base: the checkpoint it was taken from. name: what to call it, the file name where it came from a file.
    specs: tensor name -> TensorSpec: dtype, shape, eligibility, digests.
    provenance: how it came about.
    """

    def __init__(
        self,
        base: Base,
        specs: Iterable[TensorSpec],
        source: Source,
        provenance: dict[str, Any] | None = None,
        name: str = "task vector",
    ) -> None:
        self.base = base
        self.name = name
        self.specs = {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}
        self.provenance = provenance or {}
        self._source = source

    @classmethod
    def open(cls, path: str | Path) -> TaskVector:
        """Open a `.lota` file; entries are decoded when a tensor is asked for. Raises FormatError."""
        reader = LotaReader(Path(path))
        header = reader.header
        return cls(header.base, header.tensors, reader, header.provenance, Path(path).name)

    def save(self, path: str | Path, progress: Progress = silent) -> None:
        """Write a `.lota` file, one tensor in memory at a time, under its name only when complete."""
        with LotaWriter(Path(path), self.base, self.provenance) as writer:
            for done, (name, spec) in enumerate(self.specs.items()):
                progress("writing", done, len(self.specs), name)
                writer.add(spec, self[name], self.exceptions(name))
        progress("writing", len(self.specs), len(self.specs), "")

    def __getitem__(self, name: str) -> SparseTensor:
        if name not in self.specs:
            raise KeyError(name)
        return self._source.delta(name)

    def exceptions(self, name: str) -> SparseTensor:
        """Positions of a tensor whose exact tuned value base + delta does not give, with that value's bits."""
        return self._source.exceptions(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def eligible(self) -> int:
        """Elements of all eligible tensors."""
        return sum(spec.size for spec in self.specs.values() if spec.eligible)
