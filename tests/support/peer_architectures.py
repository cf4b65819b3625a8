"""Conformance of architectures: two fine-tunes of a tiny model of each, merged by mergekit and by `taskvec merge`.

Usage: python -m support.peer_architectures

Both results are loaded with transformers and compared parameter by parameter, because mergekit may write the experts of
a layer as one tensor. mergekit adds in the order of taskvec (`peer_folders.in_order`).
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import PreTrainedModel

from support.architectures import ARCHITECTURES, write_pair
from support.peer_folders import by_mergekit, by_taskvec, in_order

METHODS = ("linear", "ties")


def write_recipe(folder: Path, method: str) -> None:
    """Write a recipe for one/ and two/, in f32, for both programs."""
    weights = {"one": 0.7, "two": 0.45}
    models = [{"model": str(folder / name), "parameters": {"weight": weight}} for name, weight in weights.items()]
    document: dict[str, Any] = {"merge_method": method, "dtype": "float32", "models": models}
    if method == "ties":
        document["base_model"] = str(folder / "base")
    for file in ("merge.yaml", "ours.yaml"):
        (folder / file).write_text(yaml.safe_dump(document), encoding="utf-8")


def load(folder: Path, name: str) -> tuple[PreTrainedModel, int]:
    """Load a merged folder in f32; also return the number of its parameters that are not in the folder."""
    loaded, report = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return loaded, len(report["missing_keys"])


def compared(name: str, method: str, folder: Path) -> tuple[str, bool]:
    """Merge one/ and two/ by both programs.

    Args:
        name: The class of the model.
        method: The method.
        folder: The folder of the models.

    Returns:
        The cell of the table, and whether taskvec's result is complete and equal to mergekit's where that is.
    """
    write_recipe(folder, method)
    by_taskvec(folder, folder / f"{method}-ours")
    ours, lacking = load(folder / f"{method}-ours", name)
    try:
        with in_order():
            by_mergekit(folder, folder / f"{method}-theirs")
    except Exception as error:
        text = " ".join(str(error).replace(f"{folder}/", "").split())
        return f"mergekit: {text.rpartition('} ')[2]}", not lacking  # without a config that it may quote
    theirs, missing = load(folder / f"{method}-theirs", name)
    if missing:
        return f"mergekit leaves {missing} parameters out", not lacking
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    equal = [torch.equal(one, other) for one, other in pairs]
    return f"{sum(equal)} of {len(equal)} equal", all(equal) and not lacking


def main() -> int:
    """Print a table, and return the exit status."""
    print(f"mergekit {version('mergekit')}, transformers {version('transformers')}\n")
    print(f"| class | {' | '.join(METHODS)} |\n{'|---' * (1 + len(METHODS))}|")
    wrong = []
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            write_pair(name, Path(folder), lambda model: model.to(torch.bfloat16))
            cells = [compared(name, method, Path(folder)) for method in METHODS]
        print(f"| {name} | {' | '.join(cell for cell, _ in cells)} |", flush=True)
        if not all(right for _, right in cells):
            wrong.append(name)
    if wrong:
        print(f"not complete, or not equal: {', '.join(wrong)}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sys.exit(main())
