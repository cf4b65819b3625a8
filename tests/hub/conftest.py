"""A stand-in for the Hub with a base, and a fine-tune and two vectors of it, made without torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.building import Tensor, tensor, write_checkpoint
from support.hub import Files, Hub

import taskvec

SHAPE = (512, 256)


def weights(seed: int) -> dict[str, Tensor]:
    """Tensors of a model."""
    random = np.random.default_rng(seed)
    return {f"model.layers.{layer}.w": tensor("F32", random.normal(size=SHAPE)) for layer in range(2)}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("hub-files")
    card = {"README.md": b"---\nlicense: apache-2.0\n---\nA base.\n", "config.json": b"{}"}
    write_checkpoint(folder / "base", weights(0), files=card)
    write_checkpoint(folder / "tuned", weights(1), files=card)
    write_checkpoint(folder / "other", weights(2), files=card)
    vectors = [folder / f"{name}.lota" for name in ("one", "two")]
    for path, tuned in zip(vectors, ("tuned", "other"), strict=True):
        taskvec.pack(folder / "base", folder / tuned, path, codec="fast")
    return Files(folder, folder / "base", folder / "tuned", vectors)


@pytest.fixture
def hub(made: Files) -> Iterator[Hub]:
    with Hub() as server:
        server.add_folder("org/base", made.base)
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of the Hub's client: its cache and its settings."""
    return tmp_path / "home"
