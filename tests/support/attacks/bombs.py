"""Attacks by small files that would take much memory or time if a reader did not limit what they declare."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from support.lota_files import Parts
from taskvec import diff
from taskvec_formats import ModelFolder
from taskvec_formats.blobs import pack_blob
from taskvec_formats.codecs.numbers import encode_numbers
from taskvec_formats.header import stored_digest

from . import Attack
from .files import crafted, described, models, on_base, side_file


def raw_index(index: bytes, command: Sequence[object], folder: Path) -> Sequence[object]:
    """Write a file whose index consists of these bytes."""
    models(folder)
    diff(ModelFolder(folder / "base"), ModelFolder(folder / "tuned")).save(folder / "x.lota")
    parts = Parts.of(folder / "x.lota")
    parts.index, parts.blocks, parts.stored = index, b"", pack_blob(index)
    parts.save(folder / "x.lota")
    return command


def index_of(tensors: bytes = b"", removed: bytes = b"", files: bytes = b"null") -> bytes:
    return b'{"tensors":[%b],"removed":[%b],"shards":null,"files":%b}' % (tensors, removed, files)


def listed(item: bytes, count: int) -> bytes:
    return b",".join([item] * count)


def tensor_json(name: int, blocks: bytes = b"", shape: bytes = b"0") -> bytes:
    return b'{"base":null,"blocks":[%b],"dtype":"F32","eligible":true,"name":"%08d","origin":null,"shape":[%b]}' % (
        blocks,
        name,
        shape,
    )


MOST = 3_500_000  # maximum number of commas, colons and opening brackets in an index that is parsed
BLOCK = b'["%b",null,null,[1,"plain",0,"plain",0],null]' % (b"0" * 32)
INDEX_BOMBS: dict[str, tuple[Callable[[], bytes], str, int]] = {
    "64 MB of lists": (lambda: index_of(listed(b"[]", 22_000_000)), "commas, colons and opening brackets", 1),
    "as many lists as are parsed": (lambda: index_of(listed(b"[]", MOST // 2 - 9)), "at most 262144 are read", 1),
    "as many objects as are parsed": (lambda: index_of(listed(b'{"a":1}', MOST // 3 - 9)), "at most 262144", 1),
    "as many texts as are parsed": (lambda: index_of(listed(b'"abcdefghijkl"', MOST - 90)), "at most 262144", 1),
    "four million removed tensors": (lambda: index_of(removed=listed(b'"w"', MOST - 90)), "at most 262144", 1),
    "800,000 side files": (
        lambda: index_of(files=b"[%b]" % listed(b'["a","0",null]', 800_000)),
        "at most 16384",
        1,
    ),
    "wide characters": (lambda: index_of(removed=b'"%b"' % ("🧪" * (1 << 23)).encode()), "not all ASCII", 1),
    "200,000 tensors": (
        lambda: index_of(b",".join(tensor_json(number) for number in range(200_000))),
        "0 entries of 0 eligible",
        0,
    ),
    "a million blocks without entries": (
        lambda: index_of(tensor_json(0, listed(b"null", 1 << 20), b"%d" % (1 << 42))),
        "eligible weights",
        0,
    ),
    "two million blocks without entries": (
        lambda: index_of(tensor_json(0, listed(b"null", 1 << 21), b"%d" % (1 << 43))),
        "more than 1048576 blocks",
        1,
    ),
}
COSTS = [
    Attack(
        "310,000 blocks",
        lambda folder: raw_index(
            index_of(tensor_json(0, listed(BLOCK, 310_000), b"%d" % (310_000 << 22))), ("inspect", "x.lota"), folder
        ),
        "310,000 entries",
        0,
        is_heavy=True,
    ),
    *(
        Attack(
            f"{name}: {command[0]}",
            partial(lambda make, command, folder: raw_index(make(), command, folder), make, command),
            "x.lota" if command[0] == "verify" and not code else says,
            code,
            is_heavy=True,
        )
        for name, (make, says, code) in INDEX_BOMBS.items()
        for command in (("inspect", "x.lota"), ("verify", "x.lota"))
    ),
    Attack(
        "a description of 5 MB",
        partial(crafted, ("inspect", "x.lota"), described(provenance={"x": "y" * 5_000_000})),
        "a description of .* characters, at most 4194304",
        is_heavy=True,
    ),
    Attack(
        "a million lists in the provenance",
        partial(crafted, ("inspect", "x.lota"), described(provenance={"x": [[]] * 900_000})),
        "x.lota",
        0,
        is_heavy=True,
    ),
    *on_base(
        "a side file of a gigabyte in a megabyte",
        side_file("zeros.txt", bytes(1 << 26)),
        "makes a model of|all intact|side files",
        code=0,
    )[:1],
]


def full(rows: int, columns: int, command: Sequence[object], folder: Path) -> Sequence[object]:
    """Write two small files that each change every element of a large tensor by the same value."""
    models(folder)
    diff(ModelFolder(folder / "base"), ModelFolder(folder / "tuned")).save(folder / "x.lota")
    parts = Parts.of(folder / "x.lota")
    count = max(1, (1 << 22) // columns) * columns
    streams = encode_numbers(np.zeros(count, "u1")), encode_numbers(np.full(count, 0x3F800000, "<u4"))
    lengths = [part for stream, codec in zip(streams, ("gaps", "packed"), strict=True) for part in (codec, len(stream))]
    blocks = [[stored_digest(*streams), None, None, [count, *lengths], None]] * (rows * columns // count)
    fields = {"name": "w", "dtype": "F32", "shape": [rows, columns], "origin": "same", "eligible": True, "base": None}
    parts.index = {"tensors": [{**fields, "blocks": blocks}], "removed": [], "shards": None, "files": None}
    parts.stored, parts.blocks = pack_blob(json.dumps(parts.index).encode()), b"".join(streams) * len(blocks)
    parts.description["tuned"] = None
    parts.save(folder / "x.lota")
    parts.save(folder / "y.lota")
    return command


FULL = {
    "verify": ("verify", "x.lota"),
    "compare": ("inspect", "x.lota", "y.lota"),
    "merge": ("merge", "x.lota", "y.lota", "-o", "z.lota"),
    "arith": ("arith", "x.lota + y.lota", "-o", "z.lota"),
}
FULL_BLOCKS = [
    *(
        Attack(
            f"33 million entries in a kilobyte: {verb}",
            partial(full, 8, 1 << 22, command),
            "intact" if verb == "verify" else "33,554,432",
            0,
            is_heavy=True,
        )
        for verb, command in FULL.items()
    ),
    *(
        Attack(
            f"84 thousand million entries: {verb}",
            partial(full, 20_000, 1 << 22, command),
            "83886080000 entries in blocks of .* bytes, at most",
            is_heavy=True,
        )
        for verb, command in FULL.items()
    ),
    Attack(
        "rows of 17 million entries",
        partial(full, 2, 1 << 24, FULL["verify"]),
        "intact",
        0,
        is_heavy=True,
    ),
]
ATTACKS = [*COSTS, *FULL_BLOCKS]
