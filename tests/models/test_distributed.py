"""Leaves in two processes train what one process trains on both batches."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from taskvec import sparse_finetune

pytestmark = pytest.mark.slow

MASK = np.arange(0, 35, 3)


def train(inputs: torch.Tensor, target: torch.Tensor, *, wrapped: bool = False) -> torch.Tensor:
    """Three clipped steps, two backward passes each; wrapped: through DistributedDataParallel."""
    torch.manual_seed(0)
    model = nn.Linear(7, 5)
    with sparse_finetune(model, {"weight": MASK}) as tickets:
        model_of_loop = DistributedDataParallel(tickets) if wrapped else tickets
        optimizer = torch.optim.RMSprop(tickets.parameters(), lr=0.01)
        for _ in range(3):
            for x, y in zip(inputs, target, strict=True):
                (model_of_loop(x) - y).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(tickets.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    return model.weight.detach()


def batches() -> tuple[torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 7, generator=dice), torch.randn(2, 4, 5, generator=dice)


def rank(number: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    inputs, target = (values[:, 2 * number : 2 * number + 2] for values in batches())
    torch.save([train(inputs, target, wrapped=wrapped) for wrapped in (False, True)], f"{folder}/{number}.pt")
    distributed.barrier()
    os._exit(0)  # a process group of gloo sometimes aborts when it is destroyed


def test_gradients_are_averaged_over_processes(tmp_path: Path) -> None:
    alone = train(*batches())
    spawn(rank, (str(tmp_path),), nprocs=2)
    (first, wrapped), (second, second_wrapped) = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, wrapped)
    assert torch.equal(first, second_wrapped)
    torch.testing.assert_close(first, alone)
