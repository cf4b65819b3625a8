"""One of several processes that share a model. Usage: python -m support.sharded RANK WORLD FOLDER.

FOLDER contains `base`, `exact` (a base in f32), and `0.lota` to `2.lota`, vectors of `base`, of which the first two are
disjoint.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer, RMSprop

from support.live import loaded
from taskvec import attach, sparse_finetune
from taskvec.errors import BaseMismatchError, TrainingError, UsageError
from taskvec_formats import ModelFolder


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a model, gathered from all processes."""
    found = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        found[name] = values.full_tensor() if isinstance(values, DTensor) else values.clone()
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal to the bit."""
    carrier = {4: torch.int32, 2: torch.int16}
    return all(torch.equal(one[n].view(carrier[one[n].itemsize]), other[n].view(carrier[one[n].itemsize])) for n in one)


def sharded(base: Path, mesh: DeviceMesh | None = None) -> Any:
    """A model whose blocks and remaining parameters are sharded over all processes, or as a mesh says."""
    model: Any = loaded(base)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def steps(rank: int, folder: Path) -> None:
    """Attach and swap vectors on a sharded model, and compare it with a whole one."""
    base, files = folder / "base", [folder / f"{n}.lota" for n in range(3)]
    whole, model = loaded(base), sharded(base)
    untouched = whole_state(whole)
    first, other = attach(model, files[0]), attach(whole, files[0])

    def equal() -> bool:
        return same(whole_state(whole), whole_state(model))

    assert equal()
    assert not same(whole_state(whole), untouched)
    second, also = attach(model, files[1]), attach(whole, files[1])  # disjoint from the first
    assert equal()
    with pytest.raises((UsageError, TrainingError), match=r"both change|another process"):
        second.swap(files[2])
    assert equal()
    second.detach()
    also.detach()

    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        model(ids)  # the parameters of the root are whole tensors now, which are discarded later
        first.swap(files[2], 0.5)
        other.swap(files[2], 0.5)
        assert equal()
        assert torch.allclose(model(ids).logits, whole(ids).logits)
    for handle in (first, other):
        handle.swap(files[:2], method="ties", weights=[1, 0.5])
    assert equal()
    with first.enabled(False), other.enabled(False):
        assert same(whole_state(model), untouched)
    first.swap(files[0])
    other.swap(files[0])
    assert equal()

    edit = first.edits[0]
    own = model.get_parameter(edit.parameter).detach().to_local().view(-1)
    if rank == 0:
        own[edit.indices[0]] += 1  # another program changed the weights of one process
    with pytest.raises(
        BaseMismatchError if rank == 0 else TrainingError, match="other values" if rank == 0 else "none"
    ):
        first.swap(files[1])
    assert first.name == "0.lota"
    if rank == 0:
        own[edit.indices[0]] = edit.new[0]
    assert equal()
    first.detach()
    assert same(whole_state(model), untouched)
    # processes have parts of other sizes, but keep the same vectors
    with attach(model, files[0], cache_bytes=0) as handle:
        assert handle.decoded is not None
        limit = handle.decoded.size
    for size in (limit, limit + 1, 2 * limit - 1, 2 * limit):
        with attach(model, files[0], cache_bytes=size) as handle:
            for file in (files[1], files[2], files[0], files[1]):
                handle.swap(file)
    other.detach()
    first = attach(model, files[1], base=ModelFolder(base))
    other.swap(files[1])
    assert equal()
    first.detach()
    first.advance(files[1])
    assert equal()


def train(
    model: nn.Module,
    masks: dict[str, Any],
    rows: torch.Tensor,
    optimizer: type[Optimizer],
    base: Path,
    *,
    regrows: bool = False,
) -> Any:
    """Three clipped steps of two backward passes each, with an evaluation after each. Returns the vector."""
    with sparse_finetune(model, masks, ModelFolder(base)) as tickets:
        steps = optimizer(tickets.parameters(), lr=1e-3)
        regrowth = tickets.regrow(steps, total_steps=3, every=2, window=1, share=0.9) if regrows else None
        for step in rows:
            for ids in step:
                tickets(input_ids=ids, labels=ids).loss.backward()
            clip_grad_norm_(tickets.parameters(), 0.5)
            steps.step()
            steps.zero_grad()
            with torch.no_grad():
                tickets(input_ids=rows[0, 0])
        assert regrowth is None or regrowth.replaced > 0
        vector = tickets.vector()
        state = tickets.state_dict()
        if optimizer is AdamW:  # a state of another mask is refused by all
            steps.param_groups[0]["lr"] = 0.0
            tickets.load_state_dict(state)
    return vector


def leaves(rank: int, world: int, base: Path) -> None:
    """Train masked weights of a sharded model, and compare the result with that of a whole one."""
    rows = torch.randint(3, 15, (3, 2, 2 * world, 6), generator=torch.Generator().manual_seed(0))
    own = rows[:, :, 2 * rank : 2 * rank + 2]
    dice = np.random.default_rng(0)
    names = [name for name, _ in loaded(base).named_parameters() if "proj" in name]
    masks = {n: np.sort(dice.choice(loaded(base).get_parameter(n).numel(), 99, replace=False)) for n in names}
    masks[names[0]] = np.arange(7)  # the second process has none of them
    replicas = init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard"))
    for optimizer, mesh in ((RMSprop, None), (AdamW, None), (AdamW, replicas)):
        regrows = mesh is replicas
        vector = train(sharded(base, mesh), masks, own, optimizer, base, regrows=regrows)
        with mock.patch("torch.distributed.is_initialized", return_value=False):  # one process trains on all rows
            expected = train(loaded(base), masks, rows, optimizer, base, regrows=regrows)
        for name in expected:
            assert np.array_equal(vector[name].indices, expected[name].indices)
            np.testing.assert_allclose(vector[name].values, expected[name].values, rtol=1e-3, atol=1e-5)
    with (
        pytest.raises(UsageError, match="processes share parameter"),
        sparse_finetune(sharded(base), masks) as tickets,
    ):
        tickets.regrow(AdamW(tickets.parameters()), total_steps=3, every=2)


def main() -> None:
    """Run the steps in one process of the group."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    steps(rank, folder)
    leaves(rank, world, folder / "exact")
    distributed.barrier()
    print("equal", flush=True)
    os._exit(0)  # a process group of gloo sometimes aborts when it is destroyed


if __name__ == "__main__":
    main()
