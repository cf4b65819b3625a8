"""Checkpoints of one model in several dtypes: the dtype of what they make together, and how its shards are laid out.

A delta is the value of the tuned weight minus that of the base, whatever their dtypes. Where the tuned dtype holds
every value of the base's, as F32 does of BF16, vectors of both dtypes can be added, and the result has the wider one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from taskvec_formats import Checkpoint, TensorSpec
from taskvec_formats.container import TensorInfo, parse_header, shard_header
from taskvec_formats.dtypes import DTYPES, BitArray, DType

from .source import DeltaSource, Source, inputs_of

_PROMOTED = ("F16", "BF16", "F32", "F64")


def promoted(one: DType, other: DType) -> DType | None:
    """The narrowest dtype that holds the values of both; None where there is none.

    Of two different ones among F16, BF16, F32 and F64 it is F64 where either is, else F32, as torch promotes them.
    """
    if one == other:
        return one
    if one.name not in _PROMOTED or other.name not in _PROMOTED:
        return None
    return DTYPES["F64" if "F64" in (one.name, other.name) else "F32"]


def is_widened(spec: TensorSpec) -> bool:
    """Whether a tensor has its base's shape and a dtype that holds every value of the base's."""
    origin = spec.origin
    return origin is not None and origin.shape == spec.shape and promoted(origin.dtype, spec.dtype) == spec.dtype


class WidenedEntries(DeltaSource):
    """A Source of the entries of several vectors, whose tensors may have wider dtypes than the base's.

    sources: of the vectors that are combined. specs: of the result, by name. base: the base, where it is at hand.
    The shards are the base's, but for the dtypes; without the base they are those of the first vector that has shards
    of its own, as all have that widen a tensor.
    """

    def __init__(
        self, sources: Sequence[Source], specs: Mapping[str, TensorSpec], base: Checkpoint | None = None
    ) -> None:
        self._sources = sources
        self._forms = {name: spec.form for name, spec in specs.items()}
        self._widens = any(spec.form != spec.origin for spec in specs.values())
        self._base = base
        self.inputs = inputs_of(*sources)

    def shards(self) -> dict[str, bytes] | None:
        if not self._widens:
            return None
        if self._base is not None:
            headers: dict[str, bytes] | None = {shard.path.name: shard.header for shard in self._base.shards}
        else:
            headers = next((found for source in self._sources if (found := source.shards()) is not None), None)
        return headers and {file: self._widened(header) for file, header in headers.items()}

    def _widened(self, header: bytes) -> bytes:
        metadata, tensors = parse_header(header)
        forms = {name: self._forms.get(name, info.form) for name, info in tensors.items()}
        return (
            header if all(forms[name] == info.form for name, info in tensors.items()) else shard_header(forms, metadata)
        )


class Cast(Checkpoint):
    """A checkpoint as if its tensors had wider dtypes, converted a range at a time when asked for.

    checkpoint: itself perhaps computed. dtypes: tensor name -> a dtype that holds the values of the tensor's own.
    """

    def __init__(self, checkpoint: Checkpoint, dtypes: Mapping[str, DType]) -> None:
        self.path, self.name = checkpoint.path, checkpoint.name
        self.shards, self.side_files, self.left_out = checkpoint.shards, checkpoint.side_files, checkpoint.left_out
        self._checkpoint = checkpoint
        self._origins = {name: checkpoint.tensors[name].form for name in dtypes}
        tensors = dict(checkpoint.tensors)
        for name, dtype in dtypes.items():
            form = self._origins[name]
            tensors[name] = TensorInfo(dtype, form.shape, 0, form.size * dtype.itemsize)
        self.tensors = tensors

    @property
    def inputs(self) -> tuple[Path, ...]:
        """What the checkpoint reads."""
        return self._checkpoint.inputs

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """The elements [start, stop) of a tensor as a flat array of carriers."""
        bits = self._checkpoint.bits(name, start, stop)
        if name not in self._origins:
            return bits
        dtype = self.tensors[name].dtype
        values = bits.view(self._origins[name].dtype.real).astype(dtype.real)
        values[np.isnan(values)] = np.nan  # one NaN for all: machines convert their payloads differently
        widened: BitArray = values.view(dtype.carrier)
        return widened


def wider(base: Checkpoint, tuned: Checkpoint) -> Checkpoint:
    """`tuned`, with the tensors of which the base has the wider dtype in a dtype that holds the values of both."""
    dtypes = {}
    for name, info in tuned.tensors.items():
        origin = base.tensors.get(name)
        both = promoted(origin.dtype, info.dtype) if origin is not None and origin.shape == info.shape else None
        if both is not None and both != info.dtype:
            dtypes[name] = both
    return Cast(tuned, dtypes) if dtypes else tuned
