"""The side files of a model folder: those that depend on shards and dtypes, and those that are replaced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taskvec_formats.errors import CheckpointError
from taskvec_formats.file_names import INDEX

from ..errors import UsageError
from .output import Output
from .shards import Shard, tensor_bytes

CONFIG, CARD = "config.json", "README.md"

# side files by name: the content, or the file to copy
Files = dict[str, Path | bytes]


def written_files(files: Files, owner: str, output: Output) -> Files:
    """Return the side files that are written instead of those of a result, without a new index.

    Args:
        files: The side files of the result.
        owner: The name of the model, for the error message.
        output: How the result is written.

    Raises:
        UsageError: A dtype is given for a quantised model.
        CheckpointError: config.json is not an object.
    """
    written = files | {file.name: file.content for file in output.carried if file.content is not None}
    if output.shard_size is not None:
        written.pop(INDEX, None)
    if output.dtype is not None and CONFIG in written:
        written[CONFIG] = _config(content_of(written[CONFIG]), owner, output.dtype)
    if output.card is not None:
        written[CARD] = output.card.encode()
    return written


def new_index(files: Files, shards: Mapping[str, Shard], output: Output, *, lacking: bool = False) -> Files:
    """Return the index of the shards, if it differs from the one among the files.

    Args:
        files: The side files that are written.
        shards: The shards that are written.
        output: How the result is written.
        lacking: Whether none of the files is an index that fits the shards of the result.

    Returns:
        The index by its file name, or nothing.
    """
    resized = output.dtype is not None and INDEX in files
    if not resized and (len(shards) == 1 or (output.shard_size is None and not lacking)):
        return {}
    size = sum(tensor_bytes(form, output) for shard in shards.values() for form in shard.tensors.values())
    owners = {name: file for file, shard in shards.items() for name in shard.tensors}
    return {INDEX: _json({"metadata": {"total_size": size}, "weight_map": dict(sorted(owners.items()))})}


def content_of(file: Path | bytes) -> bytes:
    """Return the content of a side file."""
    return file if isinstance(file, bytes) else file.read_bytes()


def _config(content: bytes, owner: str, dtype: str) -> bytes:
    """Return config.json with another dtype."""
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{owner}: {CONFIG} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{owner}: {CONFIG} should be an object, found {config!r:.80}")
    if config.get("quantization_config") is not None:
        raise UsageError(f"{owner} is quantised ({CONFIG} has a quantization_config): its dtype cannot be changed")
    # older models use "torch_dtype", newer ones "dtype"
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return _json({**config, **dict.fromkeys(keys, dtype)})


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()
