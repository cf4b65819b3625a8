"""Other layouts for sparse weight changes, as whole programs that pack and unpack one pair of checkpoints.

Usage: python benchmarks/peers.py LAYOUT pack BASE TUNED FILE
       python benchmarks/peers.py LAYOUT unpack FILE BASE TUNED

BASE and TUNED are single `.safetensors` files with the same tensors. Layouts:

coo        int32 positions and new values, as TRL and vLLM transfer them, with numpy only
coo-torch  the same with torch and safetensors, as in TRL and vLLM
gaps       gaps between positions in the narrowest of u8, u16 and u32, and new values, together under zstd, as in slime
xor        base XOR tuned, whole tensors, under zstd
zipnn      base XOR tuned, whole tensors, under ZipNN, if that is installed

Each restores the tuned bytes. None checks that the base is the right one.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from taskvec_formats.container import SafetensorsFile, encode_header

Bits = np.ndarray
_ZSTD = zstandard.ZstdCompressor(level=3)


@dataclass(frozen=True)
class Layout:
    """A layout of the changes of a tensor.

    Attributes:
        encode: (base bits, tuned bits) -> bytes.
        decode: (base bits, bytes) -> tuned bits.
    """

    encode: Callable[[Bits, Bits], bytes]
    decode: Callable[[Bits, bytes], Bits]


def _coo_encode(base: Bits, tuned: Bits) -> bytes:
    changed = np.flatnonzero(base != tuned)
    return changed.astype(np.int32).tobytes() + tuned[changed].tobytes()


def _coo_decode(base: Bits, data: bytes) -> Bits:
    count = len(data) // (4 + base.itemsize)
    tuned = base.copy()
    tuned[np.frombuffer(data, np.int32, count)] = np.frombuffer(data, base.dtype, count, 4 * count)
    return tuned


def _gaps_encode(base: Bits, tuned: Bits) -> bytes:
    changed = np.flatnonzero(base != tuned)
    gaps = np.diff(changed, prepend=-1) - 1
    width = next(w for w in (1, 2, 4) if gaps.max(initial=0) < 1 << 8 * w)
    plain = gaps.astype(f"<u{width}").tobytes() + tuned[changed].tobytes()
    return bytes([width]) + _ZSTD.compress(plain)


def _gaps_decode(base: Bits, data: bytes) -> Bits:
    width, plain = data[0], zstandard.decompress(data[1:])
    count = len(plain) // (width + base.itemsize)
    gaps = np.frombuffer(plain, f"<u{width}", count).astype(np.int64)
    tuned = base.copy()
    tuned[np.cumsum(gaps + 1) - 1] = np.frombuffer(plain, base.dtype, count, width * count)
    return tuned


def _xor_encode(base: Bits, tuned: Bits) -> bytes:
    return _ZSTD.compress((base ^ tuned).tobytes())


def _xor_decode(base: Bits, data: bytes) -> Bits:
    tuned: Bits = base ^ np.frombuffer(zstandard.decompress(data), base.dtype)
    return tuned


def _zipnn(dtype: np.dtype) -> Any:
    from zipnn import ZipNN  # an optional peer

    return ZipNN(bytearray_dtype={2: "bfloat16", 4: "float32"}[dtype.itemsize], threads=2)


def _zipnn_encode(base: Bits, tuned: Bits) -> bytes:
    return bytes(_zipnn(base.dtype).compress((base ^ tuned).tobytes()))


def _zipnn_decode(base: Bits, data: bytes) -> Bits:
    tuned: Bits = base ^ np.frombuffer(_zipnn(base.dtype).decompress(data), base.dtype)
    return tuned


LAYOUTS = {
    "coo": Layout(_coo_encode, _coo_decode),
    "gaps": Layout(_gaps_encode, _gaps_decode),
    "xor": Layout(_xor_encode, _xor_decode),
    "zipnn": Layout(_zipnn_encode, _zipnn_decode),
}


def pack(layout: Layout, base: Path, tuned: Path, out: Path) -> None:
    """Write the changed tensors: a JSON index of their lengths, then their bytes."""
    before, after = SafetensorsFile(base), SafetensorsFile(tuned)
    blobs = {}
    for name in before.tensors:
        if before.bytes(name) != after.bytes(name):
            blobs[name] = layout.encode(before.bits(name), after.bits(name))
    index = json.dumps({name: len(blob) for name, blob in blobs.items()}).encode()
    with open(out, "wb") as file:
        file.write(struct.pack("<Q", len(index)) + index)
        file.writelines(blobs.values())


def unpack(layout: Layout, packed: Path, base: Path, out: Path) -> None:
    """Restore the tuned checkpoint."""
    before, data = SafetensorsFile(base), packed.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    at, blobs = 8 + length, {}
    for name, size in json.loads(data[8:at]).items():
        blobs[name] = data[at : at + size]
        at += size
    tensors = {name: (info.dtype.name, info.shape, info.stop - info.start) for name, info in before.tensors.items()}
    with open(out, "wb") as file:
        file.write(encode_header(tensors, before.metadata))
        for name in tensors:
            bits = before.bits(name)
            file.write((layout.decode(bits, blobs[name]) if name in blobs else bits).tobytes())


def pack_torch(base: Path, tuned: Path, out: Path) -> None:
    """Write the changed tensors in the layout coo-torch."""
    from safetensors.torch import load_file, save_file

    before, after = load_file(base), load_file(tuned)
    sparse = {}
    for name in before:
        changed = (before[name] != after[name]).flatten().nonzero().flatten()
        if len(changed):
            sparse[f"{name}.indices"] = changed.int()
            sparse[f"{name}.values"] = after[name].flatten()[changed]
    save_file(sparse, out)


def unpack_torch(packed: Path, base: Path, out: Path) -> None:
    """Restore the tuned checkpoint from the layout coo-torch."""
    from safetensors.torch import load_file, save_file

    tensors, sparse = load_file(base), load_file(packed)
    for name, tensor in tensors.items():
        if f"{name}.indices" in sparse:
            tensor.view(-1)[sparse[f"{name}.indices"].long()] = sparse[f"{name}.values"]
    save_file(tensors, out, {"format": "pt"})


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["coo-torch", "pack", *paths] if len(paths) == 3:
            pack_torch(*map(Path, paths))
        case ["coo-torch", "unpack", *paths] if len(paths) == 3:
            unpack_torch(*map(Path, paths))
        case [layout, "pack", *paths] if layout in LAYOUTS and len(paths) == 3:
            pack(LAYOUTS[layout], *map(Path, paths))
        case [layout, "unpack", *paths] if layout in LAYOUTS and len(paths) == 3:
            unpack(LAYOUTS[layout], *map(Path, paths))
        case _:
            sys.exit(__doc__)
