"""Models in memory, and vectors that change some positions of all of their tensors."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from taskvec import Attachment, TaskVector, attach, attached, diff
from taskvec.applying.overlay import Patched
from taskvec.errors import UsageError
from taskvec.models.loading import load_weights
from taskvec.models.placement import bits_of, parameter_at, places
from taskvec_formats import Checkpoint, ModelFolder

State = dict[str, bytes]
Small = tuple[PreTrainedModel, ModelFolder, list[Path]]


def state_of(model: nn.Module, base: Checkpoint) -> State:
    """The bits of the parameters that have tensors in the base, in the dtypes of the base."""
    placed = places(model, {name: info.form for name, info in base.tensors.items()})
    flat = {name: parameter_at(model, placed[name].parameter).detach().view(-1) for name in placed}
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


def random_steps(
    model: PreTrainedModel, base: ModelFolder, files: Sequence[Path], steps: int, seed: int = 0
) -> tuple[int, int]:
    """Attach, detach, swap, scale and disable vectors at random, and compare the weights after each step.

    The expected weights are those of the base, with the elements that differ in the checkpoint base + scale · vector,
    which `apply` would write, for each vector that is on. Steps with vectors that share elements must be refused.

    Args:
        model: A model with the weights of the base, which it has again at the end.
        base: The base.
        files: The vectors.
        steps: The number of steps.
        seed: The seed of the steps.

    Returns:
        The number of refused steps, and of pairs of vectors that share elements.
    """
    vectors, scales = [TaskVector.open(file) for file in files], (1.0, 0.5, -1.25)
    alone = {
        (n, s): Patched(base, vector if s == 1 else s * vector) for n, vector in enumerate(vectors) for s in scales
    }
    masks = [{name: set(vector[name].indices.tolist()) for name in vector} for vector in vectors]
    meets = {
        frozenset(pair)
        for pair in combinations(range(len(vectors)), 2)
        if any(masks[pair[0]].get(name, set()) & masks[pair[1]].get(name, set()) for name in base.tensors)
    }
    before = {name: base.bits(name) for name in base.tensors}
    deltas = {}
    for key, checkpoint in alone.items():
        bits = {name: checkpoint.bits(name) for name in before}
        deltas[key] = {name: (np.flatnonzero(bits[name] != before[name]), bits[name]) for name in before}

    def check(on: Iterable[tuple[int, float]]) -> None:
        wanted = {name: bits.copy() for name, bits in before.items()}
        for key in on:
            for name, (where, bits) in deltas[key].items():
                wanted[name][where] = bits[where]
        assert state_of(model, base) == {name: bits.tobytes() for name, bits in wanted.items()}

    rng = np.random.default_rng(seed)
    live: list[tuple[Attachment, tuple[int, float]]] = []
    refused = 0
    for _ in range(steps):
        move = rng.choice(["attach", "detach", "swap", "disable"]) if live else "attach"
        key = (int(rng.integers(len(vectors))), float(rng.choice(scales)))
        at = int(rng.integers(len(live))) if live else 0
        others = [held for n, (_, held) in enumerate(live) if move == "attach" or n != at]
        fits = not any(key[0] == other or frozenset((key[0], other)) in meets for other, _ in others)
        if move in ("attach", "swap") and not fits:
            refused += 1
            with pytest.raises(UsageError, match="both change"):
                attach(model, files[key[0]], key[1]) if move == "attach" else live[at][0].swap(vectors[key[0]], key[1])
        elif move == "attach":
            live.append((attach(model, vectors[key[0]], key[1]), key))
        elif move == "swap":
            live[at][0].swap(files[key[0]], key[1])
            live[at] = (live[at][0], key)
        elif move == "detach":
            live[at][0].detach()
            del live[at]
        else:
            with live[at][0].enabled(False):
                check(others)
        check(held for _, held in live)
    for handle, _ in live:
        handle.detach()
    check([])
    assert attached(model) == []
    return refused, len(meets)
