"""Checkpoints from local paths and Hugging Face Hub ids."""

from __future__ import annotations

import os
import re
from pathlib import Path

from taskvec_formats import Checkpoint, ModelFolder
from taskvec_formats.errors import NotModelError

from .arguments import path_of
from .errors import UsageError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*"]


def local_model(reference: str | os.PathLike[str], *, with_code: bool = False) -> Path:
    """Return the local path of a model.

    Args:
        reference: A folder or file, which is returned unchanged, or a Hub id ("org/name"), which is downloaded to the
            Hub's cache.
        with_code: Whether to download the model's own Python code too.

    Raises:
        UsageError: The path does not exist, and no such model can be downloaded.
    """
    path = Path(reference)
    if os.path.exists(path):  # Path.exists would raise an error for a name that is too long
        return path
    if not _HUB_ID.fullmatch(str(reference)) or str(reference).startswith("."):
        raise UsageError(f"{reference}: no such file or folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(reference), allow_patterns=_WANTED + ["*.py"] * with_code))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"{reference}: no such file or folder, and it cannot be downloaded from the Hugging Face Hub ({reason})"
        ) from None


def open_model(reference: Checkpoint | str | os.PathLike[str], *, with_code: bool = False) -> Checkpoint:
    """Open a model folder or a Hub id, for uses that need the config and the tokenizer.

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
    """Open a model folder, a single `.safetensors` file or a Hub id.

    Args:
        reference: The path or the Hub id. A checkpoint is returned unchanged.
        with_code: Whether to download the model's own Python code too, for a Hub id. Opening does not run it.

    Raises:
        UsageError: The path does not exist, and no such model can be downloaded; or it is not a model.
        FormatError: The checkpoint cannot be read.
    """
    if isinstance(reference, Checkpoint):
        return reference
    path_of("the model", reference)
    path = local_model(reference, with_code=with_code)
    is_hub_id = not os.path.exists(Path(reference))
    try:
        return ModelFolder(path, name=str(reference) if is_hub_id else None)
    except NotModelError as error:
        raise UsageError(str(error)) from None
