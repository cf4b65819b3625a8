"""Dense checkpoints: the tensors of a model, read or computed tensor by tensor, never whole."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from .container import SafetensorsFile, TensorInfo, strict_json
from .description import KEY
from .dtypes import BitArray
from .errors import CheckpointError, HeaderError
from .file_names import INDEX, SHARD, SINGLE, is_config, is_weights
from .forms import Form
from .parallel import ordered_map

CONFIG_BYTES = 1 << 22  # of a config.json: more is no configuration of a model
_REDIRECT = "transformers_weights"  # a key that names the file of weights


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


class Checkpoint(ABC):
    """The tensors of a model, which lie in a folder or are computed when they are asked for.

    Attributes:
        path: The folder or the file of the model.
        name: What to call it.
        shards: Its files of tensors, in the order of their names.
        tensors: Name -> dtype and shape, sorted by name.
        side_files: What else belongs to the model (config, tokenizer, shard index); empty for a single file.
        left_out: Names of what else is in the folder and is no part of the checkpoint: subfolders, weights in other
            files, what is not a regular file.
    """

    path: Path
    name: str
    shards: Sequence[SafetensorsFile]
    tensors: Mapping[str, TensorInfo]
    side_files: Sequence[Path]
    left_out: Sequence[str]
    _digests: dict[str, str] | None = None

    @property
    @abstractmethod
    def inputs(self) -> tuple[Path, ...]:
        """The files and folders that it reads, which no output may replace."""

    @abstractmethod
    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """The elements [start, stop) of a tensor as a flat read-only array of carriers, read or computed now."""

    def digest(self, name: str) -> str:
        """BLAKE3 of one tensor (`tensor_digest`)."""
        if self._digests is not None:
            return self._digests[name]
        form = self.tensors[name].form
        digest = begin_digest(name, form)
        for start, stop in form.blocks():
            digest.update(self.bits(name, start, stop).view(np.uint8).data)
        return digest.hexdigest()

    def digests(self, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, str]:
        """BLAKE3 of every tensor; all bytes are read once, several tensors at a time.

        Args:
            progress: Called with the tensors done and the tensors in all.
        """
        if self._digests is None:
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


class ModelFolder(Checkpoint):
    """The checkpoint in a model folder or in a single `.safetensors` file, read tensor by tensor.

    Args:
        path: The folder or the file.
        name: What to call it; None takes the last component of the path.

    Raises:
        CheckpointError: The path is missing, holds no safetensors or a `.lota` file, or shards and index disagree.
        FormatError: A shard cannot be read (`SafetensorsFile`).
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path = path = Path(path)
        self.name = name or _name_of(path)
        self.side_files: list[Path] = []
        self.left_out: list[str] = []
        if os.path.isdir(path):  # unlike the method, takes a name that is too long
            names, listed = _shards(path)
            self._sort_rest(names)
            _check_configs(self.side_files, names, str(path))
        elif os.path.isfile(path):
            path, names, listed = path.parent, [path.name], {}
        elif os.path.exists(path):
            raise CheckpointError(f"{path} is not a regular file; expected a model folder or a .safetensors file")
        else:
            raise CheckpointError(f"{path}: no such file or folder")
        self.shards = [SafetensorsFile(path / shard) for shard in names]
        self._owners = self._find_owners(listed)
        self.tensors: dict[str, TensorInfo] = {name: self._owners[name].tensors[name] for name in sorted(self._owners)}

    def _sort_rest(self, shards: list[str]) -> None:
        """Tell what else is in the folder: side files, and what is no part of the checkpoint."""
        for file in sorted(self.path.iterdir()):
            if file.name in shards:
                continue
            if file.is_file() and not is_weights(file.name):
                self.side_files.append(file)
            else:
                self.left_out.append(f"{file.name}/" if file.is_dir() else file.name)

    def _find_owners(self, listed: dict[str, str]) -> dict[str, SafetensorsFile]:
        """Tensor name -> the shard that holds it; listed: the same as the index says."""
        owners: dict[str, SafetensorsFile] = {}
        for shard in self.shards:
            if KEY in shard.metadata:
                raise CheckpointError(
                    f"{shard.path} is a .lota file, which holds changes; expected the weights of a model"
                )
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
        return owners

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The folder and every file of the model in it, or the single file: what no output may replace."""
        if not self.path.is_dir():
            return (self.path,)
        # a vector that lies in the folder is not part of the model
        files = (file for file in self.path.iterdir() if file.suffix != ".lota" and not file.is_dir())
        return (self.path, *sorted(files))

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """The elements [start, stop) of a tensor as a flat read-only array of carriers, read now."""
        return self._owners[name].bits(name, start, stop)


def fingerprint(digests: dict[str, str]) -> str:
    """The fingerprint of a checkpoint from the digests of its tensors."""
    return blake3("".join(f"{digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def _name_of(path: Path) -> str:
    """The name of a file or folder as Unicode, in which it is stored, and which it need not be."""
    try:
        return os.fsencode(path.resolve().name).decode(errors="replace")
    except ValueError as error:  # a NUL, or what the file system's encoding lacks
        raise CheckpointError(f"{str(path)!r} cannot be the name of a file ({error})") from None


def _shards(folder: Path) -> tuple[list[str], dict[str, str]]:
    """File names of the shards of a model folder, sorted, and where the index, if there is one, places each tensor."""
    names = {file.name for file in folder.iterdir() if file.is_file()}
    return find_shards(names, (folder / INDEX).read_bytes() if INDEX in names else None, str(folder))


def find_shards(names: Collection[str], index: bytes | None, where: str) -> tuple[list[str], dict[str, str]]:
    """Which files hold the weights of a model folder, as transformers finds them.

    Args:
        names: The names of all files.
        index: The content of the file INDEX, None where there is none.
        where: The folder, for errors.

    Returns:
        The shards' names, sorted, and the file of each tensor that the index lists.

    Raises:
        CheckpointError: There is no shard, the index is not one or names a file that is not there, or the folder holds
            beside its index a `model.safetensors` that is only a part of the model, or none of it.
    """
    if index is None:
        shards = [SINGLE] if SINGLE in names else sorted(name for name in names if name.endswith(SHARD))
        if not shards:
            raise CheckpointError(f"{where} holds no .safetensors file")
        return shards, {}
    try:
        document = strict_json(index)
    except HeaderError as error:
        raise CheckpointError(f"{where}: {INDEX} is not a shard index: {error}") from None
    listed = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{where}: {INDEX} is not a shard index: expected a weight_map of file names")
    shards = sorted(set(listed.values()))
    for name in shards:
        # an index from a stranger must not lead out of its folder
        if Path(name).name != name or name not in names:
            raise CheckpointError(f"{where}: {INDEX} names the shard {name!r:.200}, which is not in the folder")
    if SINGLE in names and shards != [SINGLE]:
        # transformers loads it and does not look at the index
        raise CheckpointError(
            f"{where} holds {SINGLE} beside an index of other shards, and which of both a program loads is not "
            "certain: remove one of them"
        )
    return shards, listed


def _check_configs(side_files: list[Path], shards: list[str], where: str) -> None:
    for file in side_files:
        if is_config(file.name):
            with open(file, "rb") as config:
                check_config(file.name, config.read(CONFIG_BYTES + 1), shards, where)


def check_config(name: str, content: bytes, shards: Collection[str], where: str) -> None:
    """Check that a configuration does not send a program that loads the model to other files of weights.

    transformers loads the file that `transformers_weights` names instead of those that find_shards finds. The key is
    looked for at every depth, since `attribute_map` can stand in for it.

    Args:
        name: The name of the file.
        content: Its first bytes, CONFIG_BYTES + 1 of them or all.
        shards: The names of the shards.
        where: The folder, for errors.

    Raises:
        CheckpointError: It names another file, or is larger than CONFIG_BYTES.
    """
    if len(content) > CONFIG_BYTES:
        raise CheckpointError(f"{where}: {name} has more than {CONFIG_BYTES} bytes")
    try:
        document = json.loads(content.decode())
    except (ValueError, RecursionError):
        return  # transformers cannot read it either
    for weights in _values(document, _REDIRECT):
        if weights not in (None, INDEX) and [weights] != list(shards):
            raise CheckpointError(
                f"{where}: {name} has {_REDIRECT} {weights!r:.200}, and a program would load that in place of "
                f"{', '.join(sorted(shards)):.200}: remove the key"
            )


def _values(document: Any, key: str) -> Iterator[Any]:
    """The values of a key in all objects of a JSON document."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if key in value:
                yield value[key]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
