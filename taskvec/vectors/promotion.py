"""Dtype promotion for checkpoints of one model in several dtypes, and the shard layout of the result.

A delta is the value of the tuned weight minus that of the base, whatever their dtypes. If the tuned dtype represents
every value of the base's dtype, as F32 does for BF16, vectors of both dtypes can be added. The result has the wider
dtype.
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
    """Return the narrowest dtype that represents the values of both dtypes.

    Two different dtypes of F16, BF16, F32 and F64 give F64 if one of them is F64, otherwise F32, as in torch.

    Args:
        one: A dtype.
        other: A dtype.

    Returns:
        The dtype, or None if there is none.
    """
    if one == other:
        return one
    if one.name not in _PROMOTED or other.name not in _PROMOTED:
        return None
    return DTYPES["F64" if "F64" in (one.name, other.name) else "F32"]


def is_widened(spec: TensorSpec) -> bool:
    """Return whether a tensor has its base's shape and a dtype that represents every value of the base's dtype."""
    origin = spec.origin
    return origin is not None and origin.shape == spec.shape and promoted(origin.dtype, spec.dtype) == spec.dtype


class WidenedEntries(DeltaSource):
    """A Source of the entries of several vectors, whose tensors may have wider dtypes than the base's.

    The shards are the base's, with the new dtypes. Without the base they are those of the first vector with its own
    shards; every vector that widens a tensor has them.

    Args:
        sources: The sources of the vectors that are combined.
        specs: Tensor name -> spec of the result.
        base: The base, if available.
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
    """A checkpoint with some tensors in wider dtypes, converted range by range on demand.

    Args:
        checkpoint: The original checkpoint, which may itself be computed.
        dtypes: Tensor name -> a dtype that represents the values of the tensor's own dtype.
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
        """The files and folders that the checkpoint reads."""
        return self._checkpoint.inputs

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """Return the elements [start, stop) of a tensor as a flat array of carriers."""
        bits = self._checkpoint.bits(name, start, stop)
        if name not in self._origins:
            return bits
        dtype = self.tensors[name].dtype
        values = bits.view(self._origins[name].dtype.real).astype(dtype.real)
        values[np.isnan(values)] = np.nan  # a single NaN, because machines convert NaN payloads differently
        widened: BitArray = values.view(dtype.carrier)
        return widened


def wider(base: Checkpoint, tuned: Checkpoint) -> Checkpoint:
    """Widen the tensors of `tuned` for which the base has a wider dtype.

    Args:
        base: The model before fine-tuning.
        tuned: The model after fine-tuning.

    Returns:
        `tuned` with these tensors in a dtype that represents the values of both; `tuned` itself if there are none.
    """
    dtypes = {}
    for name, info in tuned.tensors.items():
        origin = base.tensors.get(name)
        both = promoted(origin.dtype, info.dtype) if origin is not None and origin.shape == info.shape else None
        if both is not None and both != info.dtype:
            dtypes[name] = both
    return Cast(tuned, dtypes) if dtypes else tuned
