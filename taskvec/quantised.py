"""Quantised models, which a vector of the model that they were made from does not fit."""

from __future__ import annotations

import json

from taskvec_formats import Checkpoint

_CONFIG, _KEY = "config.json", "quantization_config"


def quantisation(checkpoint: Checkpoint) -> str | None:
    """Return the method by which a model is quantised as its config names it, or None.

    Args:
        checkpoint: The model. A single file has no config.
    """
    file = next((file for file in checkpoint.side_files if file.name == _CONFIG), None)
    try:
        settings = None if file is None else json.loads(file.read_bytes()).get(_KEY)
    except (OSError, ValueError, RecursionError, AttributeError):
        return None  # whatever needs the config says what is wrong with it
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return method if isinstance(method, str) else "an unknown method"


def hint(checkpoint: Checkpoint) -> str:
    """Return the end of an error message about a model that a vector does not fit: empty if it is not quantised.

    Args:
        checkpoint: The model.
    """
    method = quantisation(checkpoint)
    if method is None:
        return ""
    return (
        f"; {checkpoint.name} is quantised ({method:.40}, says its {_CONFIG}): use the model that it was quantised "
        "from, and quantise the result"
    )
