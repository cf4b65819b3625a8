"""Small checkpoints and task vectors made by hand, without a framework."""

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
    """A dense tensor: bits are its carriers, [size]."""

    dtype: DType
    shape: tuple[int, ...]
    bits: BitArray


def tensor(dtype: str, values: Any) -> Tensor:
    """A tensor from values: rounded to a floating dtype, converted to an integer one."""
    array = np.asarray(values)
    kind = DTYPES[dtype]
    target = kind.real if kind.additive else kind.carrier
    return Tensor(kind, array.shape, array.astype(target).reshape(-1).view(kind.carrier))


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file; unlike the library's numpy writer it knows every dtype."""
    layout = {name: (t.dtype.name, t.shape, t.bits.nbytes) for name, t in tensors.items()}
    path.write_bytes(encode_header(layout, metadata or {}) + b"".join(t.bits.tobytes() for t in tensors.values()))
    return path


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, files: Mapping[str, bytes] | None = None
) -> Checkpoint:
    """A model folder, its tensors dealt out to shards, with an index where there are several, and side files."""
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
    """Every tensor of a checkpoint with its bits in hex, comparable with ==."""
    return {
        name: (info.dtype.name, info.shape, checkpoint.bits(name).tobytes().hex())
        for name, info in checkpoint.tensors.items()
    }


def package(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of everything in a model folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def vector_of(deltas: Mapping[str, SparseTensor], base: Identity = BASE, name: str = "vector") -> TaskVector:
    """A vector of f32 tensors held in memory."""
    specs = {tensor: TensorSpec.like(tensor, Form(DTYPES["F32"], delta.shape)) for tensor, delta in deltas.items()}
    return TaskVector(Header("vector", base, None, tensors=()), specs.values(), Memory(deltas, specs), name=name)


def sparse(shape: tuple[int, ...], entries: Mapping[int, float]) -> SparseTensor:
    """A sparse f32 tensor from position -> value, positions increasing."""
    return SparseTensor(shape, np.array(list(entries), np.int64), np.array(list(entries.values()), np.float32))
