"""Attacks by crafted vectors and checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from support.building import tensor, write_checkpoint, write_shard
from support.lota_files import Parts
from taskvec import Checkpoint, diff
from taskvec_formats.blobs import pack_blob
from taskvec_formats.container import encode_header
from taskvec_formats.file_names import INDEX, SINGLE
from taskvec_formats.header import stored_digest

from . import Attack

BASE = {"w": tensor("F32", np.arange(6.0).reshape(2, 3)), "x": tensor("F32", [1, 2])}
TUNED = {"w": tensor("F32", [[0, 2, 2], [3, 4, 6]]), "x": tensor("F32", [1, 3])}
EVIL = {name: tensor("F32", np.full(each.shape, 666.0)) for name, each in BASE.items()}
Edit = Callable[[Parts], object]


def models(folder: Path, shards: int = 1) -> tuple[Checkpoint, Checkpoint]:
    base = write_checkpoint(folder / "base", BASE, shards, {"config.json": b"{}"})
    return base, write_checkpoint(folder / "tuned", TUNED, shards, {"config.json": b'{"a": 1}'})


def crafted(command: Sequence[object], edit: Edit, folder: Path, shards: int = 1) -> Sequence[object]:
    """Write a vector, edit it and correct its digests; the tuned folder is removed."""
    base, tuned = models(folder, shards)
    diff(base, tuned).save(folder / "x.lota")
    parts = Parts.of(folder / "x.lota")
    edit(parts)
    parts.save(folder / "x.lota")
    for file in (folder / "tuned").iterdir():
        file.unlink()
    (folder / "tuned").rmdir()
    return command


def on_base(name: str, edit: Edit, says: str, shards: int = 1, code: int = 1) -> list[Attack]:
    """Return attacks that verify and unpack an edited vector on its base, with the same outcome."""
    commands = {
        "verify": ("verify", "x.lota", "--base", "base"),
        "unpack": ("unpack", "x.lota", "--base", "base", "-o", "out"),
    }
    return [
        Attack(f"{name}: {verb}", partial(crafted, command, edit, shards=shards), says, code)
        for verb, command in commands.items()
    ]


def blob(parts: Parts, content: bytes) -> list[Any]:
    """Append a blob to the blocks, and return its entry for the index."""
    stored = pack_blob(content)
    parts.blocks += stored
    return [len(stored), len(content), stored_digest(stored)]


def side_file(name: str, content: bytes) -> Edit:
    """Add a side file, at the place that its name determines."""

    def edit(parts: Parts) -> None:
        assert name not in {file[0] for file in parts.index["files"]}
        kept = sorted((file[0], file) for file in parts.index["files"])
        before = [file for other, file in kept if other < name]
        behind = sum(file[2][0] for other, file in kept if other > name and file[2])
        cut = len(parts.blocks) - behind
        parts.blocks, rest = parts.blocks[:cut], parts.blocks[cut:]
        own = [name, hashlib.sha256(content).hexdigest(), blob(parts, content)]
        parts.blocks += rest
        parts.index["files"] = [*before, own, *(file for other, file in kept if other > name)]

    return edit


def configured(config: dict[str, Any]) -> Edit:
    """Replace config.json."""

    def edit(parts: Parts) -> None:
        (own,) = (file for file in parts.index["files"] if file[0] == "config.json")
        parts.blocks = parts.blocks[: len(parts.blocks) - own[2][0]]  # it is the last blob
        parts.index["files"].remove(own)
        side_file("config.json", json.dumps(config).encode())(parts)

    return edit


def with_config(folder: Path) -> Sequence[object]:
    models(folder)
    (folder / "tuned" / "config.json").write_text('{"transformers_weights": "a.safetensors"}')
    write_shard(folder / "tuned" / "a.safetensors", EVIL)
    return ("pack", "base", "tuned", "-o", "y.lota")


def shard(name: str, header: bytes) -> Edit:
    """Store a header as that of the only shard, in place of the header of the base."""

    def edit(parts: Parts) -> None:
        files, kept = parts.index["files"], parts.blocks
        lengths = [file[2][0] for file in files if file[2]]
        cut = len(kept) - sum(lengths)
        parts.blocks, behind = kept[:cut], kept[cut:]
        parts.index["shards"] = [[name, hashlib.sha256(header).hexdigest(), blob(parts, header)]]
        parts.blocks += behind

    return edit


def layout(tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    return encode_header(tensors, {"format": "pt"})


OWN = {"w": ("F32", (2, 3), 24), "x": ("F32", (2,), 8)}


def renamed(name: str) -> Edit:
    """Rename a tensor; it is then one that the base lacks."""

    def edit(parts: Parts) -> None:
        parts.index["tensors"][-1].update(name=name, origin=None, base=None)

    return edit


def described(**fields: Any) -> Edit:
    return lambda parts: parts.description.update(fields)


def named_base(name: str) -> Edit:
    return lambda parts: parts.description["base"].update(name=name)


def added(shape: list[int], dtype: str = "BF16") -> Edit:
    """Add a tensor of zeros that the base lacks, and a shard header that contains it."""
    size = int(np.prod([float(n) for n in shape])) * 2

    def edit(parts: Parts) -> None:
        row = shape[-1] if len(shape) > 1 else 1
        step = max(1, (1 << 22) // max(1, row)) * row
        elements = int(np.prod(np.array(shape, object)))
        blocks: list[None] = [None] * (-(-elements // step) if elements else 0)
        fields = {"name": "z", "dtype": dtype, "shape": shape, "origin": None, "eligible": True, "base": None}
        parts.index["tensors"].append({**fields, "blocks": blocks})
        shard(SINGLE, layout({**OWN, "z": (dtype, tuple(shape), size)}))(parts)

    return edit


SIDE_FILES = [
    attack
    for name in (SINGLE, "pytorch_model.bin", "model-00001-of-00001.safetensors", "adapter_config.json", "x.pickle")
    for attack in on_base(f"side file {name}", side_file(name, b"evil"), "is the name of a file of weights")
]
INDEXES = [
    *on_base(
        "an index of a shard that is not there",
        side_file(INDEX, json.dumps({"weight_map": {"w": "model-9.safetensors", "x": SINGLE}}).encode()),
        "names the shard 'model-9.safetensors', which is not in the folder",
    ),
    *on_base(
        "an index that leads out of the folder",
        side_file(INDEX, json.dumps({"weight_map": {"w": "../evil.safetensors"}}).encode()),
        "which is not in the folder",
    ),
    *on_base(
        "an index that places a tensor elsewhere",
        side_file(INDEX, json.dumps({"weight_map": {"y": SINGLE}}).encode()),
        "places tensor 'y' in 'model.safetensors', which does not contain it",
    ),
    *on_base("an index that is none", side_file(INDEX, b"[]"), "is not a shard index"),
]
ELSEWHERE = "which a program would load instead of model.safetensors"
CONFIGS = [
    *on_base("a config of other weights", configured({"transformers_weights": "a.safetensors"}), ELSEWHERE),
    *on_base(
        "a config of other weights by another key",
        configured({"attribute_map": {"transformers_weights": "k"}, "k": "a.safetensors"}),
        ELSEWHERE,
    ),
    *on_base(
        "a config of a version of other weights",
        side_file("config.4.0.0.json", b'{"transformers_weights": "a.safetensors"}'),
        ELSEWHERE,
    ),
    *on_base("a config of 5 MB", configured({"a": [[]] * 1_250_000}), "config.json has more than 4194304 bytes"),
    *on_base(
        "a config of its own weights",
        configured({"transformers_weights": SINGLE}),
        "applies to base|byte for byte",
        code=0,
    ),
    Attack("a checkpoint whose config names other weights", with_config, ELSEWHERE),
]
SHARDS = [
    *on_base("a shard config.json", shard("config.json", layout(OWN)), "is not the name of a shard"),
    *on_base("a shard ../x", shard("../x.safetensors", layout(OWN)), "is not the name of a file"),
    *on_base(
        "a shard without a tensor", shard(SINGLE, layout({"w": OWN["w"]})), "no shard contains 'x'|lacks|has tensor"
    ),
    *on_base(
        "a shard with a tensor more",
        shard(SINGLE, layout({**OWN, "y": ("F32", (1,), 4)})),
        "should be F32 \\[1\\], found none|which the result does not",
    ),
    *on_base(
        "a header that is none", shard(SINGLE, b"\x10\0\0\0\0\0\0\0{}"), "the header of shard 'model.safetensors'"
    ),
    *on_base(
        "a header of a hundred million lists",
        shard(SINGLE, struct.pack("<Q", 1 << 25) + b"[" * (1 << 25)),
        "the header of shard 'model.safetensors': not valid JSON",
    ),
    *on_base("dimensions beyond the memory", added([1 << 47, 1 << 47, 0]), "has .* elements, zero dimensions left out"),
    *on_base("17 GB of zeros", added([1 << 23, 1 << 10]), "makes a model of 17,179,869,.* bytes"),
    *on_base("17 GB of zeros in a row", added([1, 1 << 33]), "makes a model of 17,179,869,.* bytes"),
    *on_base("a million GB of zeros", added([1 << 15, 1 << 24]), "makes a model of .* bytes"),
]


ESCAPES = "\x1b[2J\x1b]0;owned\x07\r\nok\u202e"


def shown(name: str, edit: Edit, says: str, code: int = 0) -> list[Attack]:
    """Return attacks that print an edited file to the terminal."""
    commands = {
        "inspect": ("inspect", "x.lota"),
        "compare": ("inspect", "x.lota", "x.lota"),
        "json": ("inspect", "x.lota", "--json"),
    }
    return [
        Attack(f"{name}: {verb}", partial(crafted, command, edit), says, code) for verb, command in commands.items()
    ]


TEXTS = [
    *shown("escapes in the base's name", named_base(ESCAPES), "x.lota"),
    *shown("escapes in the provenance", described(provenance={"made_by": ESCAPES, ESCAPES: ESCAPES}), "x.lota"),
    *shown("markup in a tensor's name", renamed("x[/bold] [red]y[/red] :smile:"), r"x\[/bold\]"),
    *shown("Markdown in the base's name", named_base("<script>alert(1)</script>[a](javascript:x)"), "x.lota"),
    *shown("control characters in a tensor's name", renamed("x" + ESCAPES), "control character", code=1),
    *shown(
        "a provenance nested 900 levels deep",
        described(provenance={"x": json.loads("[" * 900 + "]" * 900)}),
        "provenance is nested more than 400 levels deep",
        code=1,
    ),
    *shown(
        "a provenance nested 400 levels deep",
        described(provenance=json.loads('{"x":' + "[" * 399 + "]" * 399 + "}")),
        "x.lota",
    ),
    *shown("a name of a million characters", renamed("x" * 1_000_000), "x.lota"),
    *on_base("the wrong base has escapes", named_base(ESCAPES), "x.lota", code=0)[:1],
]


def foreign(path: str, content: bytes, command: Sequence[object], folder: Path) -> Sequence[object]:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content)
    return command


def fifo(path: str, command: Sequence[object], folder: Path) -> Sequence[object]:
    models(folder)
    (folder / path).unlink(missing_ok=True)
    os.mkfifo(folder / path)
    return command


def with_tensor(name: str, folder: Path) -> Sequence[object]:
    models(folder)
    write_shard(folder / "tuned" / SINGLE, {**TUNED, name: tensor("U8", [1])})
    return ("pack", "base", "tuned", "-o", "y.lota")


def two_models(folder: Path) -> Sequence[object]:
    models(folder, shards=2)
    write_shard(folder / "tuned" / SINGLE, EVIL)
    return ("pack", "base", "tuned", "-o", "y.lota")


def not_unicode(folder: Path) -> Sequence[object]:
    models(folder)
    Path(os.fsdecode(os.fsencode(folder / "tuned") + b"/caf\xe9.txt")).write_bytes(b"")
    return ("pack", "base", "tuned", "-o", "y.lota")


CHECKPOINTS = [
    Attack("a FIFO as vector", partial(fifo, "x.lota", ("inspect", "x.lota")), "is not a regular file", 2),
    Attack(
        "a FIFO as checkpoint",
        partial(fifo, "x.safetensors", ("pack", "base", "x.safetensors", "-o", "y.lota")),
        "is not a regular file",
        2,
    ),
    Attack(
        "a FIFO as shard",
        partial(fifo, "tuned/model.safetensors", ("pack", "base", "tuned", "-o", "y.lota")),
        "holds no",
        2,
    ),
    Attack("a tensor's name with a line break", partial(with_tensor, "w U8 [1]\nx"), "has the control character"),
    Attack("a model beside an index of another", two_models, "remove one of them"),
    Attack("a side file's name that is not Unicode", not_unicode, "is not Unicode; rename or remove the file"),
    Attack("an empty file", partial(foreign, "x.lota", b"", ("inspect", "x.lota")), "is not a safetensors file"),
    Attack(
        "a header that claims exabytes",
        partial(foreign, "x.lota", struct.pack("<Q", 1 << 62) + b"{}", ("inspect", "x.lota")),
        "is not a safetensors file",
    ),
    Attack("a pickle", partial(foreign, "x.lota", b"\x80\x04.", ("verify", "x.lota")), "is not a safetensors file"),
]
ATTACKS = [*SIDE_FILES, *INDEXES, *CONFIGS, *SHARDS, *TEXTS, *CHECKPOINTS]
