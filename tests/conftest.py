"""Shared fixtures: small models of real architectures, created once per test run."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from support.live import Small

# the same examples on every machine, regardless of its speed, so that a failure can be reproduced
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

# for such small models, more threads make torch slower
os.environ.setdefault("OMP_NUM_THREADS", "1")

# tests do not use the network
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep imported modules out of garbage collections: accelerate collects after every training, 0.2 s each."""
    if any(item.get_closest_marker("slow") for item in session.items):
        import taskvec.training.loop  # noqa: F401  # torch and transformers

        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tied embeddings and a chat template, f32, one shard."""
    from support.models import make_llama

    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llama_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture in bf16, over several shards."""
    from support.models import make_llama

    return make_llama(tmp_path_factory.mktemp("llama-bf16"), dtype="bfloat16", shard_size="30KB")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2: Conv1D layers, absolute positions, no chat template, saved without the head's prefix."""
    from support.models import make_gpt2

    return make_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def tuned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full fine-tune of `llama`."""
    from support.models import perturb

    return perturb(llama, tmp_path_factory.mktemp("tuned"), dtype="float32")


@pytest.fixture(scope="session")
def vector(llama: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tuned − llama as a `.lota` file."""
    from taskvec import diff
    from taskvec_formats import ModelFolder

    path = tmp_path_factory.mktemp("vector") / "tuned.lota"
    diff(ModelFolder(llama), ModelFolder(tuned)).save(path)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training data of four rows, in the forms prompt/completion, messages and text."""
    from support.models import write_rows

    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture
def small(tmp_path: Path) -> Small:
    """A Llama in memory, its base, and two disjoint vectors."""
    from support.live import loaded, task
    from support.models import make_llama

    from taskvec_formats import ModelFolder

    base = make_llama(tmp_path / "base")
    vectors = [task(base, tmp_path / f"{n}.lota", slice(n, None, 2), seed=n) for n in range(2)]
    return loaded(base), ModelFolder(base), vectors
