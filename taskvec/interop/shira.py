"""Export of a vector as a SHiRA adapter of peft (Sparse High Rank Adapters, arXiv 2406.13175).

peft gives every layer of a SHiRA adapter the same r, and a layer of n inputs and m outputs has exactly r·(n + m)
entries. Layers with fewer entries get further ones that are zero.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from torch import nn

from taskvec_formats import Checkpoint
from taskvec_formats.sparse import Indices
from taskvec_formats.system.atomic import atomic_directory

from ..destination import appearing
from ..errors import AdapterError
from ..reporting.progress import Progress, silent
from ..vectors.vector import TaskVector
from .modules import modules_of
from .names import CONFIG, PREFIX, WEIGHTS, name_of_base


@dataclass(frozen=True)
class Shira:
    """A SHiRA adapter that was written.

    Attributes:
        path: The folder.
        r: The r of its configuration.
        entries: The number of entries of the vector.
        padding: The number of entries with value zero that were added.
        dropped: The number of replacements of the vector that an adapter cannot hold: elements that base + delta does
            not give exactly.
    """

    path: Path
    r: int
    entries: int
    padding: int
    dropped: int


@dataclass(frozen=True)
class _Layer:
    """A linear layer and its entries."""

    tensor: str
    module: str
    shape: tuple[int, int]
    indices: Indices
    values: Any

    @property
    def least(self) -> int:
        """The smallest r that has room for the entries."""
        return max(1, -(-len(self.indices) // sum(self.shape)))

    def padded(self, r: int) -> tuple[Indices, Any]:
        """Return positions and values with zeros at the first free positions, sorted by position."""
        missing = r * sum(self.shape) - len(self.indices)
        free = np.ones(self.shape[0] * self.shape[1], bool)
        free[self.indices] = False
        indices = np.concatenate((self.indices, np.flatnonzero(free)[:missing]))
        values = np.concatenate((self.values, np.zeros(missing, np.float32)))
        order = np.argsort(indices, kind="stable")
        return indices[order], values[order]


def to_shira(
    vector: TaskVector, base: Checkpoint, folder: Path, progress: Progress = silent, *, force: bool = False
) -> Shira:
    """Write a vector as a SHiRA adapter, which peft loads onto the base.

    Args:
        vector: The vector. It may change the weights of linear layers only.
        base: The model folder that it was taken from.
        folder: The folder to write.
        progress: Called for every tensor.
        force: Whether to replace an existing adapter.

    Returns:
        What was written.

    Raises:
        AdapterError: The vector changes a tensor that is not the weight of a linear layer, or no r fits.
        BaseMismatchError: The vector has another base.
        KindError: It is a patch.
        TrainingError: transformers does not know the model.
    """
    found, dropped = [], 0
    modules = _linear_modules(vector, base)
    for done, (name, module) in enumerate(modules.items()):
        progress("reading", done, len(modules), name)
        change = vector.change(name)
        dropped += len(change.replacements)
        if len(change.delta):
            rows, columns = vector.specs[name].shape
            found.append(_Layer(name, module, (rows, columns), change.delta.indices, change.delta.values))
    if not found:
        raise AdapterError(f"{vector.name} has no entries")
    r = max(layer.least for layer in found)
    for layer in found:
        rows, columns = layer.shape
        if r * (rows + columns) > rows * columns:
            fullest = max(found, key=lambda each: each.least)
            raise AdapterError(
                f"tensor {fullest.tensor!r} has {len(fullest.indices):,} entries and needs r = {r}, but tensor "
                f"{layer.tensor!r} of {rows} × {columns} weights allows r = {rows * columns // (rows + columns)} at "
                "most, and SHiRA has one r for all layers: shrink the vector"
            )
    tensors: dict[str, Any] = {}
    for layer in found:
        indices, values = layer.padded(r)
        start = f"{PREFIX}{layer.module}"
        tensors[f"{start}.shira_indices"] = np.stack(np.divmod(indices, layer.shape[1])).astype(np.int32)
        tensors[f"{start}.shira_weight"] = values
    settings = {
        "peft_type": "SHIRA",
        "r": r,
        "mask_type": "random",  # the positions of the file take the place of those that peft draws
        "random_seed": 0,
        "target_modules": [layer.module for layer in found],
        "base_model_name_or_path": name_of_base(base),
        "inference_mode": True,
    }
    with appearing(folder), atomic_directory(folder, replace=force) as temporary:
        save_file(tensors, temporary / WEIGHTS, {"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    entries = sum(len(layer.indices) for layer in found)
    return Shira(folder, r, entries, sum(r * sum(layer.shape) for layer in found) - entries, dropped)


def _linear_modules(vector: TaskVector, base: Checkpoint) -> dict[str, str]:
    """Return tensor name -> name of the linear layer whose weight it is."""
    owners = modules_of(vector, base).owners
    found = {}
    for name in vector.specs:
        owner = owners.get(name, [None])[0]
        if owner is None or not isinstance(owner.module, nn.Linear) or owner.parameter != "weight":
            raise AdapterError(f"tensor {name!r} is not the weight of a linear layer, which is what SHiRA adapts")
        found[name] = owner.name
    return found
