"""One of several processes that share a model. Usage: python -m support.sharded RANK WORLD FOLDER.

FOLDER contains `base` and the vectors `0.lota` to `2.lota`, of which the first two are disjoint.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from support.live import loaded
from taskvec import attach
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


def sharded(base: Path) -> Any:
    """A model whose blocks and remaining parameters are sharded over all processes."""
    model: Any = loaded(base)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


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


def main() -> None:
    """Run the steps in one process of the group."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    steps(rank, folder)
    distributed.barrier()
    print("equal", flush=True)
    os._exit(0)  # a process group of gloo sometimes aborts when it is destroyed


if __name__ == "__main__":
    main()
