"""The package peft, and names of the files and tensors of its adapters. Importing this loads neither torch nor peft."""

from __future__ import annotations

import os
from pathlib import Path

from taskvec_formats import Checkpoint

from ..hub.models import local_folder
from ..packages import require
from ..vectors.found import is_vector

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names of its tensors


def check_peft() -> None:
    """Raise UsageError if peft, or a package to load models with, is missing."""
    require("an adapter of peft", "lora")


def is_adapter(path: Path) -> bool:
    """Return whether a folder contains an adapter of peft, and not the weights of a model."""
    # unlike Path.is_file, accepts names that are too long
    return os.path.isfile(path / CONFIG) and all(file.name == WEIGHTS for file in path.glob("*.safetensors"))


def adapter_at(place: str | os.PathLike[str]) -> Path | None:
    """Return the folder of an adapter of peft, local or on the Hub, whose repository is downloaded to its cache.

    Args:
        place: A path, or `user/repo` or `user/repo@revision`.

    Returns:
        The folder. None if there is something else, or nothing.

    Raises:
        HubError: The repository cannot be downloaded.
    """
    if not os.path.exists(place) and is_vector(place):
        return None
    folder = local_folder(place)
    return folder if is_adapter(folder) else None


def files_of(path: Path) -> tuple[Path, ...]:
    """Return a folder and the files in it, which no output may replace."""
    return (path, *sorted(path.glob("*")))


def name_of(adapter: Path) -> str:
    """Return the name of an adapter for the provenance: that of its folder, or of its repository on the Hub.

    Args:
        adapter: The folder, which may be that of a commit in the Hub's cache.
    """
    folder = adapter.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name


def name_of_base(base: Checkpoint) -> str:
    """Return `base_model_name_or_path` of an adapter of a base: its repository on the Hub, or its path."""
    return str(base.path) if base.commit is None else base.commit.repo
