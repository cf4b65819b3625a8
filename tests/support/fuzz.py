"""Structured fuzzing of the `.lota` reader: `make fuzz`, or `python -m support.fuzz [CASES [SEED]]`.

Each case damages one of the golden files at one of three depths:

bytes   The bytes of the file: bits are flipped, ranges are overwritten, removed, inserted and copied. The digests are
        left unchanged, so a file that can still be read must give the original content.
header  The description or the index, as JSON: values are replaced, removed and repeated. The digests are recomputed.
blocks  The stored streams. The digests are recomputed, so that the codecs read the damaged bytes.

A case must end within SECONDS, either with a FormatError or with a content, which for `bytes` must be the original
one. The memory of the whole run must not grow by more than MEGABYTES.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.paths import GOLDEN
from taskvec_formats import FormatError, LotaReader, ModelFolder
from taskvec_formats.blobs import pack_blob, unpack_blob
from taskvec_formats.container import SafetensorsFile, encode_header
from taskvec_formats.forms import take_for

VALID = GOLDEN / "valid"
SECONDS = 20
MEGABYTES = 512
_BASE_ELEMENTS = 1 << 16  # the base does not fit a mutated shape; below this size, zeros take its place
_NUMBERS = [0, 1, -1, 7, 255, 1 << 22, 1 << 31, 1 << 47, 1 << 64, 0.5]
_JUNK = [None, True, *_NUMBERS, "", "x", "gaps", "steps", "0" * 16, [], [0], {}]


@dataclass(frozen=True)
class Seed:
    """A golden file, its parts, and its content as returned by `read`."""

    path: Path
    data: bytes
    description: dict[str, Any]
    index: dict[str, Any]
    blocks: bytes
    content: Any


class HangError(Exception):
    """Raised if a case takes longer than SECONDS."""


def seeds() -> list[Seed]:
    """Return the golden files, without those that have tensors of several blocks, since these are large."""
    found = []
    for path in sorted(VALID.glob("*.lota")):
        file = SafetensorsFile(path)
        description = json.loads(file.metadata["taskvec"])
        index = json.loads(unpack_blob(file.bytes("taskvec.index"), description["index"]["size"], "index"))
        if all(len(tensor["blocks"]) <= 1 for tensor in index["tensors"]):
            blocks = bytes(file.bytes("taskvec.blocks"))
            found.append(Seed(path, path.read_bytes(), description, index, blocks, read(path, path)))
    return found


def read(path: Path, seed: Path) -> Any:
    """Read everything in a file, comparable with ==.

    Args:
        path: The file.
        seed: The golden file from which it was made; its base is stored next to it.
    """
    reader = LotaReader(path)
    reader.verify()
    beside = seed.with_suffix(".base.safetensors")
    base = ModelFolder(beside) if beside.exists() else None
    content = []
    for name, spec in reader.specs.items():
        bits = None
        if reader.header.kind == "patch":
            if base and name in base.tensors and base.tensors[name].form == spec.origin and spec.size < _BASE_ELEMENTS:
                bits = take_for(base.bits(name), spec.origin, spec.form)
            elif spec.size < _BASE_ELEMENTS:
                bits = np.zeros(spec.size, spec.dtype.carrier)
            else:
                continue
        change = reader.change(name, base=bits)
        parts = ((part.indices.tobytes(), part.values.tobytes()) for part in (change.delta, change.replacements))
        content.append((name, str(spec.form), str(spec.origin), spec.eligible, spec.base, tuple(parts)))
    header = reader.header
    kept = (header.kind, header.base, header.tuned, header.removed, json.dumps(header.provenance, sort_keys=True))
    return kept, content, reader.shards(), reader.files()


def assemble(description: dict[str, Any], index: Any, blocks: bytes, dice: random.Random) -> bytes:
    """Build a file from these parts with correct digests, except that of the index in a tenth of the cases."""
    text = json.dumps(index, separators=(",", ":")).encode()
    stored = pack_blob(text) if dice.random() < 0.2 else text
    description = copy.deepcopy(description)
    if isinstance(description.get("index"), dict) and dice.random() < 0.9:
        description["index"] = {"size": len(text), "sha256": hashlib.sha256(stored).hexdigest()}
    top = json.dumps(description, separators=(",", ":"))
    metadata = {"taskvec": top, "taskvec.sha256": hashlib.sha256(top.encode()).hexdigest()}
    layout: dict[str, tuple[str, tuple[int, ...], int]] = {
        "taskvec.index": ("U8", (len(stored),), len(stored)),
        "taskvec.blocks": ("U8", (len(blocks),), len(blocks)),
    }
    return encode_header(layout, metadata) + stored + blocks


def damage_bytes(data: bytes, dice: random.Random) -> bytes:
    """Make a few random edits."""
    edited = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        at, length = dice.randrange(len(edited) + 1), dice.choice((1, 1, 2, 8, 40))
        match dice.randrange(6):
            case 0 if at < len(edited):
                edited[at] ^= 1 << dice.randrange(8)
            case 1:
                edited[at : at + length] = dice.randbytes(len(edited[at : at + length]))
            case 2:
                del edited[at : at + length]
            case 3:
                edited[at:at] = dice.randbytes(length)
            case 4:
                source = dice.randrange(len(edited) + 1)
                edited[at : at + length] = edited[source : source + length]
            case _:
                edited[at : at + length] = bytes([dice.choice((0, 1, 127, 128, 255))]) * len(edited[at : at + length])
    return bytes(edited)


def damage_json(document: Any, dice: random.Random) -> None:
    """Replace, remove, repeat or modify one value at a random place of a document, in place."""
    places = list(_places(document))
    if not places:
        return
    holder, key = dice.choice(places)
    value = holder[key]
    match dice.randrange(5):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(value))
        case 2 if isinstance(value, int):
            holder[key] = value + dice.choice((-1, 1, 8, 1 << 20, 1 << 40))
        case 3 if isinstance(value, str) and value:
            at = dice.randrange(len(value))
            holder[key] = value[:at] + dice.choice(("", "0", "f", "é", "/", "\0")) + value[at + 1 :]
        case _:
            other, other_key = dice.choice(places)
            holder[key] = copy.deepcopy(dice.choice([*_JUNK, other[other_key]]))


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place in a document: a list or dict, and an index or key of it."""
    if not isinstance(document, (dict, list)):
        return
    for key, value in list(document.items() if isinstance(document, dict) else enumerate(document)):
        yield document, key
        yield from _places(value)


def damage_blocks(seed: Seed, dice: random.Random) -> bytes:
    """Damage one stored block, and correct its length and its digest."""
    index, data = copy.deepcopy(seed.index), seed.blocks
    stored, offset = [], 0
    for tensor in index["tensors"]:
        for block in tensor["blocks"]:
            if block:
                stored.append((block, offset))
                offset += sum(part[2] + part[4] for part in block[3:] if part)
    if not stored:
        return damage_bytes(seed.data, dice)
    block, offset = dice.choice(stored)
    part = dice.choice([part for part in block[3:] if part])
    for before in block[3:]:
        if before is part:
            break
        offset += before[2] + before[4] if before else 0
    which = dice.choice((2, 4))
    offset += part[2] if which == 4 else 0
    stream = damage_bytes(data[offset : offset + part[which]], dice)
    data = data[:offset] + stream + data[offset + part[which] :]
    part[which] = len(stream)
    begin = offset = 0
    for tensor in index["tensors"]:
        for each in tensor["blocks"]:
            if each:
                begin, offset = offset, offset + sum(part[2] + part[4] for part in each[3:] if part)
                each[0] = hashlib.sha256(data[begin:offset]).hexdigest()[:32]
    return assemble(seed.description, index, data, dice)


@contextmanager
def watchdog() -> Iterator[None]:
    """Raise HangError if the block takes longer than SECONDS."""

    def ring(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(cases: int, seed: int, folder: Path) -> Counter[str]:
    """Run cases and count their outcomes.

    Args:
        cases: The number of cases.
        seed: The seed of all random choices.
        folder: A folder for the damaged file.

    Returns:
        Outcome -> number of cases: "read", or the name of an exception class.

    Raises:
        AssertionError: If a case ends in any other way. The message says how to reproduce it.
    """
    dice = random.Random(seed)
    golden = seeds()
    outcomes: Counter[str] = Counter()
    path = folder / "case.lota"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(cases):
        origin, depth = dice.choice(golden), dice.choice(("bytes", "header", "blocks"))
        if depth == "bytes":
            data = damage_bytes(origin.data, dice)
        elif depth == "blocks":
            data = damage_blocks(origin, dice)
        else:
            description, index = copy.deepcopy(origin.description), copy.deepcopy(origin.index)
            for _ in range(dice.choice((1, 1, 2))):
                damage_json(dice.choice((description, index, index.get("tensors") or index)), dice)
            data = assemble(description, index, origin.blocks, dice)
        path.write_bytes(data)
        outcome = "read"
        try:
            with watchdog():
                content = read(path, origin.path)
            if depth == "bytes":
                assert content == origin.content, f"case {case} of seed {seed}: {origin.path.name} reads differently"
        except FormatError as error:
            outcome = type(error).__name__
        except AssertionError:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            kept = Path(tempfile.gettempdir()) / f"taskvec-fuzz-{seed}-{case}.lota"
            kept.write_bytes(data)
            raise AssertionError(f"case {case} of seed {seed} ({origin.path.name}, {depth}), kept as {kept}") from error
        outcomes[outcome] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    assert grown < MEGABYTES, f"memory grew by {grown:.0f} MB"
    return outcomes


if __name__ == "__main__":
    wanted, start = [*map(int, sys.argv[1:]), *(100_000, 0)[len(sys.argv) - 1 :]]
    with tempfile.TemporaryDirectory() as scratch:
        for name, count in sorted(run(wanted, start, Path(scratch)).items()):
            print(f"{count:>8,} {name}")
