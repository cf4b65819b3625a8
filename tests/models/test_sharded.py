"""Vectors on models that several processes share, as by `fully_shard`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from support.live import loaded, on_disk, state_of, task
from support.models import make_llama
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from taskvec import attach
from taskvec.errors import BaseMismatchError, TrainingError
from taskvec_formats import ModelFolder

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1]


def test_two_processes_share_a_model(tmp_path: Path) -> None:
    """Each compares its steps with those on a whole model (support/sharded.py)."""
    base = make_llama(tmp_path / "base", dtype="bfloat16")
    make_llama(tmp_path / "exact")
    for n, positions in enumerate((slice(0, None, 2), slice(1, None, 2), slice(None))):
        task(base, tmp_path / f"{n}.lota", positions, seed=n)
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "support.sharded", str(rank), "2", str(tmp_path)],
                    env={**os.environ, "PYTHONPATH": paths},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in range(2)
        ]
        for process in processes:
            stack.callback(process.kill)
        for process in processes:
            output, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            assert output.splitlines()[-1] == "equal"


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def by_columns(parameter: nn.Parameter) -> Shard:
    return Shard(parameter.ndim - 1)


@pytest.mark.usefixtures("alone")
def test_other_divisions_are_refused(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    vector = task(base, tmp_path / "0.lota", slice(None), seed=0)
    model = loaded(base)
    fully_shard(model, shard_placement_fn=by_columns)
    with pytest.raises(
        TrainingError, match=r"parameter '.*' is divided among processes as \(Shard\(dim=1\),\): only a"
    ):
        attach(model, vector)


def test_parameters_that_became_smaller_are_refused(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    model = loaded(base)
    handle = attach(model, task(base, tmp_path / "0.lota", slice(None), seed=0))
    norm = model.model.norm
    weights = norm.weight
    norm.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(BaseMismatchError, match=r"'model\.norm\.weight' of the model has only 1 elements"):
        handle.detach()
    norm.weight = weights
    handle.detach()
    assert state_of(model, ModelFolder(base)) == on_disk(ModelFolder(base))
