"""Packages that only some functions need, and the extras of pyproject.toml that install them."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import UsageError

_TRAIN = ("torch", "transformers", "accelerate")
# extra -> the packages that it installs, by the names under which they are imported
EXTRAS = {
    "train": _TRAIN,
    "lora": (*_TRAIN, "peft"),
    "eval": (*_TRAIN, "rouge_score"),
    "data": (*_TRAIN, "datasets", "pyarrow"),
    "search": (*_TRAIN, "optuna"),
    "demo": (*_TRAIN, "gguf", "matplotlib"),
    "plot": ("matplotlib",),
}


def require(what: str, extra: str, *packages: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        what: What needs them, for the message.
        extra: The extra that installs them, one of EXTRAS.
        *packages: The packages, by the names under which they are imported. By default all of the extra.

    Raises:
        UsageError: One of them is not installed.
    """
    missing = [package.replace("_", "-") for package in packages or EXTRAS[extra] if not _is_installed(package)]
    if missing:
        *first, last = missing
        named = f"packages {', '.join(first)} and {last}" if first else f"package {last}"
        raise UsageError(f"{what} needs the {named}: pip install 'taskvec[{extra}]'")


def _is_installed(package: str) -> bool:
    found = find_spec(package)
    return found is not None and found.origin is not None  # a folder of that name is found too, and has no origin
