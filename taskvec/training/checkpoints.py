"""Checkpoints of a training phase, which another number of processes can read.

Every trained parameter is a list of numbers: the deltas of a leaf in the order of their positions, or the elements of a
parameter. A process writes the range of each list that it has, with the state of the optimizer for it, to a file of its
own. A process that resumes reads the ranges that it needs from all files. All processes see the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from ..errors import ResumeError, TrainingError
from ..models.sharding import own_part, own_range
from ..models.sparse_model import SparseModel
from .processes import Processes

_FILES = "part-*-of-*.safetensors"
_MASK = "mask.safetensors"
_ABOUT = "taskvec.checkpoint"  # key of the metadata
_VALUES = "values"  # beside the names of the optimizer's state


@dataclass(frozen=True)
class Piece:
    """The numbers of a trained parameter that this process has.

    Attributes:
        name: Name of the parameter.
        parameter: The parameter, as the optimizer has it.
        first: Index of the first of these numbers in the whole list.
        count: How many they are.
        total: Length of the whole list.
    """

    name: str
    parameter: nn.Parameter
    first: int
    count: int
    total: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These numbers of the parameter, or of a tensor of its form: a flat view, [count]."""
        return own_part(tensor).view(-1)[: self.count]


def pieces_of(model: nn.Module, processes: Processes) -> list[Piece]:
    """Return the pieces of a model's trained parameters. All processes must call this together.

    Args:
        model: A model, or the tickets of one.
        processes: The processes of the run.
    """
    found = []
    if isinstance(model, SparseModel):
        leaves = list(model.leaves.values())
        counts = processes.gather_parts([len(leaf.indices) for leaf in leaves])
        for leaf, *parts in zip(leaves, *counts, strict=True):
            first = sum(parts[: processes.shard])
            found.append(Piece(leaf.name, leaf.delta, first, parts[processes.shard], sum(parts)))
        return found
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            first, stop = own_range(name, parameter)
            found.append(Piece(name, parameter, first, stop - first, parameter.numel()))
    return found


def save_part(folder: Path, pieces: list[Piece], optimizer: Optimizer, processes: Processes) -> None:
    """Write the part of a checkpoint that this process has, unless another replica writes it.

    Args:
        folder: The folder of the checkpoint.
        pieces: The pieces of the trained parameters.
        optimizer: Their optimizer.
        processes: The processes of the run.

    Raises:
        TrainingError: The file cannot be written.
    """
    if not processes.in_first_replica:
        return
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, float]] = {}
    for piece in pieces:
        tensors[f"{piece.name}/{_VALUES}"] = piece.of(piece.parameter)
        for key, value in optimizer.state.get(piece.parameter, {}).items():
            if isinstance(value, torch.Tensor) and value.dim():
                tensors[f"{piece.name}/{key}"] = piece.of(value)
            elif value is not None:
                scalars.setdefault(piece.name, {})[key] = float(value)
    about = {
        "ranges": {piece.name: [piece.first, piece.count, piece.total] for piece in pieces},
        "scalars": scalars,
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"part-{processes.shard:05}-of-{processes.shards:05}.safetensors"
    try:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            file,
            metadata={_ABOUT: json.dumps(about)},
        )
    except SafetensorError as error:
        raise TrainingError(f"{file} cannot be written: {error}") from None


def save_mask(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Write the state of a mask that changes during training.

    Args:
        folder: The folder of the checkpoint.
        state: Its `Regrowth.state_dict`.

    Raises:
        TrainingError: The file cannot be written.
    """
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, folder / _MASK)
    except SafetensorError as error:
        raise TrainingError(f"{folder / _MASK} cannot be written: {error}") from None


def load_mask(folder: Path) -> dict[str, torch.Tensor]:
    """Read what `save_mask` wrote.

    Args:
        folder: The folder of the checkpoint.

    Raises:
        ResumeError: The file is missing or damaged.
    """
    try:
        return load_file(folder / _MASK)
    except (SafetensorError, OSError) as error:
        raise ResumeError(f"{folder} is damaged: {error}") from None


def remove_parts(folder: Path) -> None:
    """Remove what a run that was killed while it wrote the same checkpoint has left, possibly of other processes.

    Args:
        folder: The folder of the checkpoint.
    """
    for file in folder.glob(_FILES):
        file.unlink()


def load_parts(folder: Path, pieces: list[Piece], optimizer: Optimizer | None = None) -> None:
    """Read what this process needs of a checkpoint.

    Args:
        folder: The folder of the checkpoint.
        pieces: The pieces of the trained parameters, whose values are replaced.
        optimizer: Their optimizer, whose state is replaced; None leaves it as it is.

    Raises:
        ResumeError: The checkpoint is not one of these parameters, or is incomplete.
    """
    try:
        files = [_Part(path) for path in sorted(folder.glob(_FILES))]
        if not files:
            raise ResumeError(f"{folder} is a checkpoint without values")
        for piece in pieces:
            keys = {key: None for file in files for key in file.keys_of(piece.name)}
            if optimizer is None:
                keys = {_VALUES: None}
            else:
                optimizer.state[piece.parameter].clear()
            for key in keys:
                target: torch.Tensor = piece.parameter
                if key != _VALUES:
                    assert optimizer is not None
                    target = torch.zeros_like(piece.parameter, requires_grad=False)
                    optimizer.state[piece.parameter][key] = target
                _fill(folder, files, piece, key, piece.of(target))
            if optimizer is not None:
                for key, value in files[0].scalars.get(piece.name, {}).items():
                    optimizer.state[piece.parameter][key] = torch.tensor(value)
        if optimizer is not None:
            for group, stored in zip(optimizer.param_groups, files[0].groups, strict=True):
                group.update(stored)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{folder} is damaged: {error}") from None


@torch.no_grad()
def _fill(folder: Path, files: list[_Part], piece: Piece, key: str, values: torch.Tensor) -> None:
    filled = 0
    for file in files:
        first, count, total = file.ranges.get(piece.name, (0, 0, piece.total))
        if total != piece.total:
            raise ResumeError(f"{folder}: {piece.name!r} has {total} trained numbers there, {piece.total} here")
        start, stop = max(first, piece.first), min(first + count, piece.first + piece.count)
        if start < stop:
            part = file.read(f"{piece.name}/{key}", start - first, stop - first)
            values[start - piece.first : stop - piece.first].copy_(part)
            filled += stop - start
    if filled != piece.count:
        raise ResumeError(f"{folder} lacks {piece.count - filled} of {piece.count} numbers of {piece.name!r}")


class _Part:
    """A file of a checkpoint."""

    def __init__(self, path: Path) -> None:
        file: Any = safe_open(path, "pt")
        about: dict[str, Any] = json.loads(file.metadata()[_ABOUT])
        self._file = file
        self.ranges: dict[str, tuple[int, int, int]] = about["ranges"]
        self.scalars: dict[str, dict[str, float]] = about["scalars"]
        self.groups: list[dict[str, Any]] = about["groups"]
        self._keys: dict[str, list[str]] = {}
        for full in file.keys():  # noqa: SIM118 - not a dict
            name, _, key = full.rpartition("/")
            self._keys.setdefault(name, []).append(key)

    def keys_of(self, name: str) -> Iterator[str]:
        """Yield what the file has of a parameter: its values, and the names of the optimizer's state."""
        yield from self._keys.get(name, ())

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read a range of a tensor."""
        part: torch.Tensor = self._file.get_slice(name)[start:stop]
        return part
