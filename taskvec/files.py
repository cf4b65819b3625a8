"""From what a user types to a checkpoint, and the guard in front of every output."""

from __future__ import annotations

import re
from pathlib import Path

from taskvec_formats import Checkpoint

from .errors import OutputExistsError, UsageError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*"]


def local_model(reference: str | Path, *, with_code: bool = False) -> Path:
    """The local path of a model: a folder or file as it is, a Hub id ("org/name") downloaded to the Hub's cache.

    with_code: download Python code too, where a model has code of its own.
    Raises UsageError where there is neither such a path nor such a model within reach.
    """
    path = Path(reference)
    if path.exists():
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


def open_checkpoint(reference: str | Path, *, with_code: bool = False) -> Checkpoint:
    """Open a model folder, a single `.safetensors` file or a Hub id. Raises UsageError and FormatError.

    with_code: of a Hub id, download the model's own Python code too; opening runs none.
    """
    path = local_model(reference, with_code=with_code)
    is_hub_id = not Path(reference).exists()
    return Checkpoint(path, name=str(reference) if is_hub_id else None)


def check_output(path: Path, *, force: bool) -> None:
    """Refuse an output file that exists, before any work is done; with `force` it will be replaced.

    Raises OutputExistsError, and UsageError where a folder has that name.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; the output is a file")
    if path.exists() and not force:
        raise OutputExistsError(f"{path} exists already; --force replaces it")


def check_output_folder(path: Path, base: Checkpoint, *, force: bool) -> None:
    """The same for a model folder. `force` replaces only what looks like one, never the base or its parents.

    Raises OutputExistsError, and UsageError for a file, for the base itself, and for a folder that holds no model.
    """
    if path.resolve() == base.path.resolve() or path.resolve() in base.path.resolve().parents:
        raise UsageError(f"{path} holds the base; the output needs a folder of its own")
    if not path.exists():
        return
    if not path.is_dir():
        raise UsageError(f"{path} is a file; the output is a folder")
    if any(path.iterdir()):
        if not any(path.glob("*.safetensors")):
            raise UsageError(f"{path} exists and holds no model; it will not be replaced")
        if not force:
            raise OutputExistsError(f"{path} exists already; --force replaces it")
