"""Folders with all kinds of inputs, and snapshots of folders, for tests that commands do not change their inputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from support.building import tensor, write_checkpoint, write_shard
from support.models import write_rows
from taskvec import diff

TENSORS = {f"model.layers.{i}.weight": tensor("F32", np.arange(6.0)) for i in range(3)}
MOVED = {name: tensor("F32", np.arange(6.0) + (np.arange(6) == 2)) for name in TENSORS}
FILES = {"config.json": b"{}", "tokenizer.json": b"{}"}
RECIPE = "merge_method: task_arithmetic\nbase_model: {folder}/base\nmodels: [{{model: {folder}/tuned}}]\n"


def make_inputs(folder: Path) -> Path:
    """Fill a folder with all kinds of inputs, and return it."""
    base = write_checkpoint(folder / "base", TENSORS, 2, FILES)
    tuned = write_checkpoint(folder / "tuned", MOVED, 2, FILES)
    diff(base, tuned).save(folder / "a.lota")
    diff(base, tuned, sparsity=0.9).save(folder / "b.lota")
    (folder / "recipe.yml").write_text(RECIPE.format(folder=folder))
    write_rows(folder / "rows.jsonl")
    # a base whose weights are links to another folder, as in the cache of the Hub
    (folder / "blobs").mkdir()
    write_shard(folder / "blobs" / "x.safetensors", TENSORS)
    (folder / "linked").mkdir()
    (folder / "linked" / "config.json").write_bytes(b"{}")
    (folder / "linked" / "model.safetensors").symlink_to(folder / "blobs" / "x.safetensors")
    (folder / "linked.lota").symlink_to("a.lota")
    (folder / "way").symlink_to("base")
    # a model folder that contains a vector
    write_checkpoint(folder / "dir", TENSORS, 1, FILES)
    (folder / "dir" / "v.lota").write_bytes((folder / "a.lota").read_bytes())
    return folder


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Return everything in a folder, by relative path: the bytes of files, the targets of links, and other types."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        what: bytes | str = f"mode {path.lstat().st_mode}"  # of a FIFO, since reading one waits for a writer
        if path.is_symlink():
            what = os.readlink(path)
        elif path.is_dir():
            what = "folder"
        elif path.is_file():
            what = path.read_bytes()
        found[str(path.relative_to(folder))] = what
    return found


def into(name: str, content: bytes = b"1") -> Callable[[Path], object]:
    """Return a function that writes a file of this name into a folder."""

    def put(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return put


def existing(path: Path) -> None:
    """Create a file that taskvec did not write."""
    path.write_bytes(b"mine")
