"""Dense checkpoints: the tensors of a model, read or computed one at a time, never as a whole."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from blake3 import blake3

from .container import SafetensorsFile, TensorInfo, strict_json
from .description import KEY
from .dtypes import BitArray
from .errors import CheckpointError, HeaderError, NotModelError
from .file_names import GGUF, INDEX, SHARD, SINGLE, is_config, is_weights
from .forms import Form
from .system.parallel import ordered_map

CONFIG_BYTES = 1 << 22  # limit for a config.json, far above the size of real ones
_GGUF_HINT = (
    ", whose weights are converted and often quantised: use the safetensors model that it was made from, and convert "
    "the result"
)
_REDIRECT = "transformers_weights"  # key that names the file of weights


def begin_digest(name: str, form: Form) -> blake3:
    """Start the BLAKE3 digest of a tensor with a line of its name, dtype and shape.

    Args:
        name: Name of the tensor.
        form: Dtype and shape.

    Returns:
        The hasher. The caller updates it with the tensor's bytes in row-major order.
    """
    return blake3(f"{name} {form}\n".encode())


def tensor_digest(name: str, form: Form, data: bytes | memoryview) -> str:
    """Compute the BLAKE3 digest of a tensor.

    Args:
        name: Name of the tensor.
        form: Dtype and shape.
        data: Bytes in row-major order.

    Returns:
        The digest, 32 bytes in hex.
    """
    digest = begin_digest(name, form)
    digest.update(data)
    return digest.hexdigest()


def short(digest: str) -> str:
    """Shorten a digest to its first 8 bytes, which are enough to distinguish tensors.

    Args:
        digest: The digest, in hex.

    Returns:
        The first 8 bytes, in hex.
    """
    return digest[:16]


class Shard(Protocol):
    """A file of tensors: a `SafetensorsFile`, or one that is not written yet."""

    @property
    def path(self) -> Path:
        """The path, or the name of a file that is not written yet."""

    @property
    def header(self) -> bytes:
        """The header, including the length prefix."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Mapping from tensor name to its dtype, shape and byte range."""


@dataclass(frozen=True)
class HubCommit:
    """One state of a model on the Hugging Face Hub.

    Attributes:
        repo: The repository, "user/repo".
        revision: The commit, 40 hex digits.
    """

    repo: str
    revision: str


class Checkpoint(ABC):
    """The tensors of a model, stored in a folder or computed on request.

    Attributes:
        path: Folder or file of the model.
        name: Name for display.
        shards: Files of tensors, sorted by name, which need not be written yet.
        tensors: Mapping from name to dtype and shape, sorted by name.
        side_files: Other files that belong to the model (config, tokenizer, shard index); empty for a single file.
        left_out: Names of everything else in the folder, which is not part of the checkpoint: subfolders, weights in
            other files, and anything that is not a regular file.
        commit: Where it was downloaded from, None for a checkpoint from elsewhere.
    """

    path: Path
    name: str
    shards: Sequence[Shard]
    tensors: Mapping[str, TensorInfo]
    side_files: Sequence[Path]
    left_out: Sequence[str]
    commit: HubCommit | None = None
    _digests: dict[str, str] | None = None

    @property
    @abstractmethod
    def inputs(self) -> tuple[Path, ...]:
        """The files and folders that the checkpoint reads. No output may replace them."""

    @abstractmethod
    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """Read or compute the elements [start, stop) of a tensor.

        Args:
            name: Name of the tensor.
            start: First element.
            stop: Element after the last one, None for the end of the tensor.

        Returns:
            A flat read-only array of carriers, [stop − start].
        """

    @property
    def is_folder(self) -> bool:
        """Whether the checkpoint has a folder on disk, with shards, a config and other files."""
        return self.path.is_dir()

    def __repr__(self) -> str:
        size = sum(info.form.size * info.dtype.itemsize for info in self.tensors.values())
        return f"<{type(self).__name__} {self.name!r}: {len(self.tensors)} tensors, {size:,} bytes>"

    def digest(self, name: str) -> str:
        """Compute the BLAKE3 digest of one tensor (see `tensor_digest`).

        Args:
            name: Name of the tensor.

        Returns:
            The digest, in hex.
        """
        if self._digests is not None:
            return self._digests[name]
        form = self.tensors[name].form
        digest = begin_digest(name, form)
        for start, stop in form.blocks():
            digest.update(self.bits(name, start, stop).view(np.uint8).data)
        return digest.hexdigest()

    def digests(self, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, str]:
        """Compute the BLAKE3 digests of all tensors.

        All bytes are read once, several tensors at a time. The result is cached.

        Args:
            progress: Called with the number of finished tensors and the number of all tensors.

        Returns:
            Mapping from tensor name to digest, in hex.
        """
        if self._digests is None:
            digests = {}
            for name, digest in zip(self.tensors, ordered_map(self.digest, self.tensors), strict=True):
                digests[name] = digest
                progress(len(digests), len(self.tensors))
            self._digests = digests
        return self._digests

    @property
    def is_written(self) -> bool:
        """Whether the shards are files, rather than planned."""
        return True

    @property
    def is_identified(self) -> bool:
        """Whether `identity` is known without reading the tensors."""
        return self.is_hashed

    @property
    def identity(self) -> str:
        """A text that identifies the tensors: the fingerprint, unless the checkpoint is computed."""
        return self.fingerprint

    @property
    def is_hashed(self) -> bool:
        """Whether the digests of all tensors are known."""
        return self._digests is not None

    def remember(self, digests: dict[str, str]) -> None:
        """Use digests that are known, so that the bytes need not be read.

        Args:
            digests: Mapping from the name of each tensor to its digest, in hex, as `digest` computes it.
        """
        self._digests = {name: digests[name] for name in self.tensors}

    @cached_property
    def fingerprint(self) -> str:
        """BLAKE3 of the digests of all tensors in the order of their names, independent of the sharding."""
        return fingerprint(self.digests())


class ModelFolder(Checkpoint):
    """The checkpoint in a model folder or in a single `.safetensors` file, read tensor by tensor.

    Args:
        path: The folder or the file.
        name: Name for display. If None, the last component of the path.

    Raises:
        CheckpointError: The path does not exist, contains no safetensors file, or is a `.lota` file; or shards and
            index contradict each other.
        FormatError: A shard cannot be read (see `SafetensorsFile`).
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path = path = Path(path)
        self.name = name or _name_of(path)
        self.side_files: list[Path] = []
        self.left_out: list[str] = []
        if os.path.isdir(path):  # unlike Path.is_dir, accepts names that are too long
            names, listed = _shards(path)
            self._sort_rest(names)
            _check_configs(self.side_files, names, str(path))
        elif os.path.isfile(path):
            _check_no_gguf(path)
            path, names, listed = path.parent, [path.name], {}
        elif os.path.exists(path):
            raise NotModelError(f"{path} is not a regular file; expected a model folder or a .safetensors file")
        else:
            raise CheckpointError(f"{path}: no such file or folder")
        files = [SafetensorsFile(path / shard) for shard in names]
        self.shards = files
        self._owners = self._find_owners(files, listed)
        self.tensors: dict[str, TensorInfo] = {name: self._owners[name].tensors[name] for name in sorted(self._owners)}

    def _sort_rest(self, shards: list[str]) -> None:
        """Divide the other files of the folder into side files and what is not part of the checkpoint."""
        for file in sorted(self.path.iterdir()):
            if file.name in shards:
                continue
            if file.is_file() and not is_weights(file.name):
                self.side_files.append(file)
            else:
                self.left_out.append(f"{file.name}/" if file.is_dir() else file.name)

    def _find_owners(self, files: Sequence[SafetensorsFile], listed: dict[str, str]) -> dict[str, SafetensorsFile]:
        """Return tensor name -> shard; `listed` is the same mapping, to file names, from the index."""
        owners: dict[str, SafetensorsFile] = {}
        for shard in files:
            if KEY in shard.metadata:
                raise NotModelError(
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
        """The folder and every file of the model in it, or the single file. No output may replace them."""
        if not self.path.is_dir():
            return (self.path,)
        # a vector stored in the folder is not part of the model
        files = (file for file in self.path.iterdir() if file.suffix != ".lota" and not file.is_dir())
        return (self.path, *sorted(files))

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """Read the elements [start, stop) of a tensor.

        Args:
            name: Name of the tensor.
            start: First element.
            stop: Element after the last one, None for the end of the tensor.

        Returns:
            A flat read-only array of carriers, [stop − start].
        """
        return self._owners[name].bits(name, start, stop)


def fingerprint(digests: dict[str, str]) -> str:
    """Compute the fingerprint of a checkpoint.

    Args:
        digests: Mapping from tensor name to digest, for all tensors.

    Returns:
        The fingerprint, 32 bytes in hex.
    """
    return blake3("".join(f"{digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def _name_of(path: Path) -> str:
    """Return the name of a file or folder; bytes that are not valid Unicode are replaced."""
    try:
        return os.fsencode(path.resolve().name).decode(errors="replace")
    except ValueError as error:  # NUL, or a character that the file system's encoding lacks
        raise CheckpointError(f"{str(path)!r} cannot be the name of a file ({error})") from None


def _shards(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the sorted names of the shards of a model folder, and the tensor -> file mapping of its index, if any."""
    names = {file.name for file in folder.iterdir() if file.is_file()}
    return find_shards(names, (folder / INDEX).read_bytes() if INDEX in names else None, str(folder))


def find_shards(names: Collection[str], index: bytes | None, where: str) -> tuple[list[str], dict[str, str]]:
    """Find the files with the weights of a model folder as transformers does.

    Args:
        names: Names of all files.
        index: Content of the file INDEX, None if it does not exist.
        where: The folder, for error messages.

    Returns:
        The sorted names of the shards, and the mapping from tensor name to file name given in the index.

    Raises:
        CheckpointError: There is no shard, the index is invalid or names a file that does not exist, or the folder
            contains both an index and a `model.safetensors` that is not the only shard of the index.
    """
    if index is None:
        shards = [SINGLE] if SINGLE in names else sorted(name for name in names if name.endswith(SHARD))
        if not shards:
            if gguf := min((name for name in names if name.lower().endswith(GGUF)), default=None):
                raise NotModelError(f"{where} holds no .safetensors file, but {gguf}{_GGUF_HINT}")
            raise NotModelError(f"{where} holds no .safetensors file")
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
        # an untrusted index must not point outside its folder
        if Path(name).name != name or name not in names:
            raise CheckpointError(f"{where}: {INDEX} names the shard {name!r:.200}, which is not in the folder")
    if SINGLE in names and shards != [SINGLE]:
        # transformers loads it and ignores the index
        raise CheckpointError(
            f"{where} holds {SINGLE} beside an index of other shards; it is uncertain which of them a program loads: "
            "remove one of them"
        )
    return shards, listed


def _check_no_gguf(path: Path) -> None:
    """Raise NotModelError if a file is a GGUF file, which a person may take for a model here."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError:
        return  # opening it as a safetensors file raises the error that explains it
    if magic == b"GGUF":
        raise NotModelError(f"{path} is a GGUF file{_GGUF_HINT}")


def _check_configs(side_files: list[Path], shards: list[str], where: str) -> None:
    for file in side_files:
        if is_config(file.name):
            with open(file, "rb") as config:
                check_config(file.name, config.read(CONFIG_BYTES + 1), shards, where)


def check_config(name: str, content: bytes, shards: Collection[str], where: str) -> None:
    """Check that a configuration does not make a program load other weights.

    transformers loads the file that `transformers_weights` names instead of those that `find_shards` finds. The key is
    searched at every depth, because an `attribute_map` can also define it.

    Args:
        name: Name of the file.
        content: Its first CONFIG_BYTES + 1 bytes, or all of it if it is shorter.
        shards: Names of the shards.
        where: The folder, for error messages.

    Raises:
        CheckpointError: The configuration names another file, or is larger than CONFIG_BYTES.
    """
    if len(content) > CONFIG_BYTES:
        raise CheckpointError(f"{where}: {name} has more than {CONFIG_BYTES} bytes")
    try:
        document = json.loads(content.decode())
    except (ValueError, RecursionError):
        return  # transformers cannot parse it either
    for weights in _values(document, _REDIRECT):
        if weights not in (None, INDEX) and [weights] != list(shards):
            raise CheckpointError(
                f"{where}: {name} has {_REDIRECT} {weights!r:.200}, which a program would load instead of "
                f"{', '.join(sorted(shards)):.200}: remove the key"
            )


def _values(document: Any, key: str) -> Iterator[Any]:
    """Yield the values of a key in all objects of a JSON document."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if key in value:
                yield value[key]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
