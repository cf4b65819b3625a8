"""The package peft, and names of the files and tensors of its adapters. Importing this loads neither torch nor peft."""

from __future__ import annotations

from pathlib import Path

from taskvec_formats import Checkpoint

from ..errors import UsageError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names of its tensors


def check_peft() -> None:
    """Raise UsageError if peft is missing."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UsageError("LoRA needs the package peft: pip install 'taskvec[lora]'") from None


def is_adapter(path: Path) -> bool:
    """Return whether a folder contains an adapter of peft, and not the weights of a model."""
    return (path / CONFIG).is_file() and all(file.name == WEIGHTS for file in path.glob("*.safetensors"))


def files_of(path: Path) -> tuple[Path, ...]:
    """Return a folder and the files in it, which no output may replace."""
    return (path, *sorted(path.glob("*")))


def reference_to(base: Checkpoint) -> str:
    """Return what the configuration of an adapter says of its base: the Hub id, or the path."""
    return base.name if "/" in base.name else str(base.path)
