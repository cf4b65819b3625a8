"""Checkpoints from local paths and from the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from taskvec_formats import Checkpoint, HubCommit, ModelFolder
from taskvec_formats.errors import CheckpointError, NotModelError

from ..arguments import path_of
from ..errors import UsageError
from .client import asking
from .reference import Reference, reference_to, written

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*"]


def _download(reference: Reference, *, with_code: bool) -> Path:
    """Download a model to the Hub's cache, unless it is there, and return the folder, whose name is the commit.

    Raises:
        HubError: It does not exist, cannot be read, or cannot be stored.
        UsageError: It has no file of those that a model consists of.
    """
    from huggingface_hub import snapshot_download

    patterns = _WANTED + ["*.py"] * with_code
    with asking(reference):
        folder = Path(snapshot_download(reference.repo, revision=reference.revision, allow_patterns=patterns))
    if not folder.exists():  # the client makes no folder without files
        raise UsageError(f"{reference} holds no .safetensors file")
    return folder


def local_folder(reference: str | os.PathLike[str]) -> Path:
    """Return a folder, or the files of a repository of the Hub in its cache.

    Args:
        reference: A path, or `user/repo` or `user/repo@revision`.

    Returns:
        The path as it was given, which need not exist, or that in the cache.

    Raises:
        HubError: The repository cannot be downloaded.
        UsageError: It has no file of those that a model consists of.
    """
    on_hub = reference_to(reference, file=False)
    return path_of("the folder", reference) if on_hub is None else _download(on_hub, with_code=False)


def open_model(reference: Checkpoint | str | os.PathLike[str], *, with_code: bool = False) -> Checkpoint:
    """Open a model folder or a model on the Hub, for uses that need the config and the tokenizer.

    Args:
        reference: As in `open_checkpoint`.
        with_code: As in `open_checkpoint`.

    Raises:
        UsageError: The path is a single file; or as in `open_checkpoint`.
        FormatError: The checkpoint cannot be read.
    """
    checkpoint = open_checkpoint(reference, with_code=with_code)
    if checkpoint.path.is_file():
        raise UsageError(f"{checkpoint.path} is a single file: a model folder with config and tokenizer is needed here")
    return checkpoint


def open_checkpoint(reference: Checkpoint | str | os.PathLike[str], *, with_code: bool = False) -> Checkpoint:
    """Open a model folder, a single `.safetensors` file or a model on the Hub.

    Args:
        reference: The path, or `user/repo` or `user/repo@revision`, which is downloaded to the Hub's cache. A
            checkpoint is returned unchanged.
        with_code: Whether to download the model's own Python code too. Opening does not run it.

    Raises:
        UsageError: The path does not exist, or it is not a model.
        HubError: The model cannot be downloaded.
        FormatError: The checkpoint cannot be read.
    """
    if isinstance(reference, Checkpoint):
        return reference
    path = path_of("the model", reference)
    on_hub = reference_to(reference, file=False)
    if on_hub is None:
        if not os.path.exists(path):  # Path.exists would raise an error for a name that is too long
            raise UsageError(f"{written(reference)}: no such file or folder")
        try:
            return ModelFolder(path)
        except NotModelError as error:
            raise UsageError(str(error)) from None
    folder = _download(on_hub, with_code=with_code)
    try:
        checkpoint = ModelFolder(folder, name=on_hub.repo)
    except CheckpointError as error:
        raise UsageError(str(error).replace(str(folder), str(on_hub))) from None
    checkpoint.commit = HubCommit(on_hub.repo, folder.name)
    return checkpoint
