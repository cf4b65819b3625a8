"""A dense checkpoint on disk: one safetensors file or a folder of shards, read tensor by tensor, never whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from blake3 import blake3

from .container import SafetensorsFile, TensorInfo, strict_json
from .dtypes import BitArray
from .errors import CheckpointError, HeaderError
from .forms import Form
from .parallel import ordered_map

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# weights in other formats: not part of what is read here, and not worth copying beside the result
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".lota")


def begin_digest(name: str, form: Form) -> blake3:
    """BLAKE3 of a tensor, begun: a line of its name, dtype and shape; its bytes in row-major order are to follow."""
    return blake3(f"{name} {form}\n".encode())


def tensor_digest(name: str, form: Form, data: bytes | memoryview) -> str:
    """BLAKE3 of a tensor, in hex."""
    digest = begin_digest(name, form)
    digest.update(data)
    return digest.hexdigest()


def short(digest: str) -> str:
    """The first 8 bytes of a digest, in hex: enough to tell one tensor from another."""
    return digest[:16]


class Checkpoint:
    """The tensors of a model folder or of a single `.safetensors` file.

    path: the folder or the file; name: its last component, or the name given.
    shards: the files, in the order of their names.
    tensors: name -> TensorInfo, sorted by name.
    side_files: what else belongs to the model (config, tokenizer, shard index), empty for a single file.

    Raises CheckpointError where the path is missing, holds no safetensors, or shards and index disagree, and the errors
    of SafetensorsFile for a bad shard.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path = path = Path(path)
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

    def bytes(self, name: str) -> memoryview:
        """The raw bytes of a tensor, mapped."""
        return self._owners[name].bytes(name)

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's pages; they are read again when touched."""
        self._owners[name].release(name)

    def digest(self, name: str) -> str:
        """BLAKE3 of one tensor (tensor_digest)."""
        if "_digests" in self.__dict__:
            return self._digests[name]
        digest = tensor_digest(name, self.tensors[name].form, self.bytes(name))
        self.release(name)
        return digest

    def digests(self, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, str]:
        """BLAKE3 of every tensor; all bytes are read once, several tensors at a time.

        progress(tensors done, tensors).
        """
        if "_digests" not in self.__dict__:
            digests = {}
            for name, digest in zip(self.tensors, ordered_map(self.digest, self.tensors), strict=True):
                digests[name] = digest
                progress(len(digests), len(self.tensors))
            self._digests = digests
        return self._digests

    @cached_property
    def fingerprint(self) -> str:
        """BLAKE3 over the digests of all tensors in the order of their names: independent of how they are sharded."""
        return fingerprint(self.digests())


def fingerprint(digests: dict[str, str]) -> str:
    """The fingerprint of a checkpoint from the digests of its tensors."""
    return blake3("".join(f"{digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


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
