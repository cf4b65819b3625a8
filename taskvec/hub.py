"""From what a user types to a checkpoint."""

from __future__ import annotations

import os
import re
from pathlib import Path

from taskvec_formats import Checkpoint, ModelFolder

from .errors import UsageError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*"]


def local_model(reference: str | os.PathLike[str], *, with_code: bool = False) -> Path:
    """The local path of a model: a folder or file as it is, a Hub id ("org/name") downloaded to the Hub's cache.

    with_code: download Python code too, where a model has code of its own.
    Raises UsageError where there is neither such a path nor such a model within reach.
    """
    path = Path(reference)
    if os.path.exists(path):  # unlike the method of a path, takes a name that is too long
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
            f"{reference}: no such file or folder here, and not to be had from the Hugging Face Hub ({reason})"
        ) from None


def open_checkpoint(reference: str | os.PathLike[str], *, with_code: bool = False) -> Checkpoint:
    """Open a model folder, a single `.safetensors` file or a Hub id. Raises UsageError and FormatError.

    with_code: of a Hub id, download the model's own Python code too; opening runs none.
    """
    path = local_model(reference, with_code=with_code)
    is_hub_id = not os.path.exists(Path(reference))
    return ModelFolder(path, name=str(reference) if is_hub_id else None)
