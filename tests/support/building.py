"""Builders of small checkpoints and task vectors, without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from taskvec import TaskVector
from taskvec.vectors.source import Memory
from taskvec_formats import Checkpoint, Form, Header, Identity, ModelFolder, SparseTensor, TensorSpec
from taskvec_formats.container import encode_header
from taskvec_formats.dtypes import DTYPES, BitArray, DType

BASE = Identity("base", "ba5e" * 16)


class Tensor(NamedTuple):
    """A dense tensor.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        bits: Its elements as unsigned integers, [size].
    """

    dtype: DType
    shape: tuple[int, ...]
    bits: BitArray


def tensor(dtype: str, values: Any) -> Tensor:
    """Build a tensor from values, which are rounded to a floating-point dtype or converted to an integer dtype."""
    array = np.asarray(values)
    kind = DTYPES[dtype]
    target = kind.real if kind.additive else kind.carrier
    return Tensor(kind, array.shape, array.astype(target).reshape(-1).view(kind.carrier))


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file. Unlike the numpy writer of safetensors, this supports every dtype."""
    layout = {name: (t.dtype.name, t.shape, t.bits.nbytes) for name, t in tensors.items()}
    path.write_bytes(encode_header(layout, metadata or {}) + b"".join(t.bits.tobytes() for t in tensors.values()))
    return path


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, files: Mapping[str, bytes] | None = None
) -> Checkpoint:
    """Write a model folder.

    Args:
        folder: The folder, which must not exist.
        tensors: Tensor name -> tensor. They are distributed to the shards in turn.
        shards: The number of shards; with more than one, an index is written.
        files: Side files: name -> content.
    """
    folder.mkdir()
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if shards == 1:
        names = ["model.safetensors"]
    weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
    for shard in names:
        write_shard(folder / shard, {n: t for n, t in tensors.items() if weight_map[n] == shard}, {"format": "pt"})
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return ModelFolder(folder)


def contents(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Return every tensor of a checkpoint, with its bits in hexadecimal, comparable with ==."""
    return {
        name: (info.dtype.name, info.shape, checkpoint.bits(name).tobytes().hex())
        for name, info in checkpoint.tensors.items()
    }


def package(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a model folder, by file name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def vector_of(deltas: Mapping[str, SparseTensor], base: Identity = BASE, name: str = "vector") -> TaskVector:
    """Build a vector of f32 tensors in memory."""
    specs = {tensor: TensorSpec.like(tensor, Form(DTYPES["F32"], delta.shape)) for tensor, delta in deltas.items()}
    return TaskVector(Header("vector", base, None, tensors=()), specs.values(), Memory(deltas, specs), name=name)


def sparse(shape: tuple[int, ...], entries: Mapping[int, float]) -> SparseTensor:
    """Build a sparse f32 tensor from position -> value, with increasing positions."""
    return SparseTensor(shape, np.array(list(entries), np.int64), np.array(list(entries.values()), np.float32))
