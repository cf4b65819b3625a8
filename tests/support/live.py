"""Models in memory, and vectors that change some positions of all of their tensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from taskvec import diff
from taskvec.models.edits import flat_parameter
from taskvec.models.loading import load_weights
from taskvec.models.placement import bits_of, places
from taskvec_formats import Checkpoint, ModelFolder

State = dict[str, bytes]
Small = tuple[PreTrainedModel, ModelFolder, list[Path]]


def state_of(model: nn.Module, base: Checkpoint) -> State:
    """The bits of the parameters that have tensors in the base, in the dtypes of the base."""
    placed = places(model, {name: info.form for name, info in base.tensors.items()})
    flat = {name: flat_parameter(model, placed[name].parameter) for name in placed}
    sizes = {name: base.tensors[name].form.size for name in placed}
    return {
        name: bits_of(base.tensors[name].dtype, flat[name][place.start : place.start + sizes[name]]).tobytes()
        for name, place in placed.items()
    }


def on_disk(checkpoint: Checkpoint) -> State:
    return {name: checkpoint.bits(name).tobytes() for name in checkpoint.tensors}


def loaded(folder: Path) -> PreTrainedModel:
    """The model in the dtype of its checkpoint."""
    return load_weights(folder, {})


def changed(base: Path, out: Path, positions: slice, *, seed: int) -> Path:
    """A copy of the base in which random elements among the positions of each tensor differ."""
    shutil.copytree(base, out)
    generator = torch.Generator().manual_seed(seed)
    for shard in out.glob("*.safetensors"):
        tensors = load_file(shard)
        for values in tensors.values():
            chosen = values.view(-1)[positions]
            where = torch.rand(chosen.shape, generator=generator) < 0.3
            noise = torch.randn(chosen.shape, generator=generator).to(values.dtype)
            chosen.copy_(torch.where(where, chosen + noise, chosen))
        save_file(tensors, shard, {"format": "pt"})
    return out


def task(base: Path, out: Path, positions: slice, *, seed: int, kind: str = "vector") -> Path:
    """A `.lota` file of changes of some positions."""
    diff(base, changed(base, out.with_suffix(""), positions, seed=seed), kind=kind).save(out)
    return out
