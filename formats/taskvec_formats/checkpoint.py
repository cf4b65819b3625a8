"""A dense checkpoint on disk: one safetensors file or a folder of shards, read tensor by tensor, never whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from .container import SafetensorsFile, TensorInfo, strict_json
from .dtypes import BitArray, DType
from .errors import CheckpointError, HeaderError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# weights in other formats: not part of what is read here, and not worth copying beside the result
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".lota")


def tensor_digest(name: str, dtype: DType, shape: tuple[int, ...], data: memoryview) -> str:
    """SHA-256, in hex, of a tensor: a line of its name, dtype and shape, then its bytes in row-major order."""
    digest = hashlib.sha256(f"{name} {dtype.name} {list(shape)}\n".encode())
    digest.update(data)
    return digest.hexdigest()


class Checkpoint:
    """The tensors of a model folder or of a single `.safetensors` file.

    path: the folder or the file; name: its last component, or the name given.
    shards: the files, in the order of their names.
    tensors: name -> TensorInfo, sorted by name.
    side_files: what else belongs to the model (config, tokenizer, shard index), empty for a single file.

    Raises CheckpointError where the path is missing, holds no safetensors, or shards and index disagree, and the errors
    of SafetensorsFile for a bad shard.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or path.resolve().name
        self.side_files: list[Path] = []
        if path.is_dir():
            names, listed = _shards(path)
            self.side_files = sorted(
                file for file in path.iterdir() if file.is_file() and file.suffix not in _OTHER_WEIGHTS
            )
        elif path.is_file():
            path, names = path.parent, [path.name]
            listed = {}
        else:
            raise CheckpointError(f"{path}: no such file or folder")
        self.shards = [SafetensorsFile(path / shard) for shard in names]
        owners: dict[str, SafetensorsFile] = {}
        for shard in self.shards:
            for tensor in shard.tensors:
                if tensor in owners:
                    raise CheckpointError(
                        f"{self.path}: tensor {tensor!r} is in both {owners[tensor].path.name} and {shard.path.name}"
                    )
                owners[tensor] = shard
        for tensor, shard_name in listed.items():
            if tensor not in owners or owners[tensor].path.name != shard_name:
                raise CheckpointError(
                    f"{self.path}: the index places tensor {tensor!r} in {shard_name}, which lacks it"
                )
        self._owners = owners
        self.tensors: dict[str, TensorInfo] = {name: owners[name].tensors[name] for name in sorted(owners)}

    def bits(self, name: str) -> BitArray:
        """A tensor as a flat read-only mapped array of carriers, [size]."""
        return self._owners[name].bits(name)

    def digest(self, name: str) -> str:
        """SHA-256 of one tensor (tensor_digest)."""
        info = self.tensors[name]
        return tensor_digest(name, info.dtype, info.shape, self._owners[name].bytes(name))

    def digests(self, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, str]:
        """SHA-256 of every tensor; all bytes are read once, by as many threads as there are cores.

        progress(tensors done, tensors).
        """
        if "_digests" not in self.__dict__:
            digests = {}
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for name, digest in zip(self.tensors, pool.map(self.digest, self.tensors), strict=True):
                    digests[name] = digest
                    progress(len(digests), len(self.tensors))
            self._digests = digests
        return self._digests

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the digests of all tensors in the order of their names: independent of how they are sharded."""
        return fingerprint(self.digests())


def fingerprint(digests: dict[str, Any]) -> str:
    """The fingerprint of a checkpoint from the digests of its tensors."""
    return hashlib.sha256("".join(f"{digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def _shards(folder: Path) -> tuple[list[str], dict[str, str]]:
    """File names of the shards of a model folder, sorted, and where the index, if there is one, places each tensor."""
    index = folder / INDEX
    if index.is_file():
        try:
            document = strict_json(index.read_bytes())
        except HeaderError as error:
            raise CheckpointError(f"{index} is not a shard index: {error}") from None
        listed = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise CheckpointError(f"{index} is not a shard index: expected a weight_map of file names")
        names = sorted(set(listed.values()))
        for name in names:
            # an index from a stranger must not lead out of its folder
            if Path(name).name != name or not (folder / name).is_file():
                raise CheckpointError(f"{index} names the shard {name!r}, which is not in the folder")
        return names, listed
    if (folder / SINGLE).is_file():
        return [SINGLE], {}
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise CheckpointError(f"{folder} holds no .safetensors file")
    return names, {}
