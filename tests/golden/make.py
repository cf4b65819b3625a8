"""Write the golden files anew; read README.md first."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from support.lota_files import (
    DEFECTS,
    Dense,
    Parts,
    Tensors,
    blocks_of,
    dense,
    read,
    reals,
    save_tensors,
    side_file,
    write_good,
    write_pair,
)

from taskvec_formats import Change, Header, Identity, LotaWriter, SparseTensor, TensorSpec
from taskvec_formats.dtypes import DTYPES

FOLDER = Path(__file__).parent
FLOATS = [dtype.name for dtype in DTYPES.values() if dtype.additive]
NAN, MINUS_ZERO = 0x7FC00001, 0x80000000
# kind, base, tuned, and what else write_pair takes
Pair = tuple[str, Tensors, Tensors, dict[str, Any]]


def noise(count: int, below: int, seed: int = 1) -> list[int]:
    """Numbers that look random and are the same everywhere: Knuth's multiplicative hash."""
    return [((place + seed) * 2654435761 % (1 << 32) * below) >> 32 for place in range(count)]


def weights(dtype: str, count: int, shape: tuple[int, ...]) -> Dense:
    """Weights as a model has them: both signs, exponents that vary."""
    values = [(n - 500) / 1000 * 2.0 ** -(place % 5) for place, n in enumerate(noise(count, 1000))]
    return reals(dtype, values, shape)


def moved(tensor: Dense, places: dict[int, int]) -> Dense:
    """Bit patterns moved by some steps."""
    bits = tensor.bits.copy()
    for place, step in places.items():
        bits[place] = (int(bits[place]) + step) % (1 << 8 * bits.itemsize)
    return Dense(tensor.form, bits)


def some(count: int, size: int, steps: int = 3) -> dict[int, int]:
    """Steps at about `count` places."""
    return {
        place: 1 + step for place, step in zip(sorted(set(noise(count, size, 7))), noise(count, steps), strict=False)
    }


def every_dtype(names: list[str]) -> tuple[Tensors, Tensors]:
    """Six elements of each: three moved a step, one the lowest bit pattern, one all ones."""
    base, tuned = {}, {}
    for name in names:
        dtype = DTYPES[name]
        base[name] = (
            reals(name, [1, -2, 3, 0.5, 0, 1.5], (2, 3)) if dtype.additive else dense(name, range(1, 7), (2, 3))
        )
        ones = (1 << 8 * dtype.itemsize) - 1
        changed = moved(base[name], {0: 1, 2: 2}).bits
        changed[3], changed[5] = 0, ones
        tuned[name] = Dense(base[name].form, changed)
    return base, tuned


def pair(kind: str, dtype: str, codecs: tuple[str, str] | None, shape: tuple[int, ...], count: int) -> Pair:
    base = weights(dtype, int(np.prod(shape)), shape)
    tuned = moved(base, some(count, len(base.bits)))
    return kind, {"w": base, "x": reals("F32", [1])}, {"w": tuned, "x": reals("F32", [1])}, {"codecs": codecs}


def exceptions() -> Pair:
    """Results that no sum gives."""
    base = reals("F32", [1, 2, 3, 1e-30, 0, 6, 7])
    bits = base.bits.copy()
    bits[[0, 1, 2, 4]] = [NAN, 0x7F800000, 0xFF800000, MINUS_ZERO]
    bits[3] = reals("F32", [1e30]).bits[0]
    bits[5] += np.uint32(1)
    return "vector", {"w": base}, {"w": Dense(base.form, bits)}, {}


def shapes_and_names() -> Pair:
    base = {
        "": reals("F32", 1.0),
        "0-d": reals("BF16", 2.0),
        "empty": reals("F32", np.zeros((0, 3))),
        "one": reals("F16", [[[[3.0]]]]),
        'quote " and \\ and /': reals("F32", [1, 2, 3]),
        "weights.层.ω": reals("F32", [[1], [2]]),
        "\U0001f9ea": reals("F32", [[1, 2]]),
    }
    tuned = {name: moved(tensor, dict.fromkeys(range(min(1, len(tensor.bits))), 1)) for name, tensor in base.items()}
    return "vector", base, tuned | {"empty": reals("F32", np.zeros((0, 4)))}, {}


def structure(kind: str) -> Pair:
    """Tensors added, removed, resized and retyped, other shards, other side files."""
    base = {
        "gone": reals("F32", [1, 2]),
        "grown": reals("BF16", [[1, 2], [3, 4]]),
        "kept": reals("F32", [1]),
        "lost": dense("I64", [1]),
        "retyped": reals("F32", [1.5, 1e-3, -2]),
        "shrunk": reals("F32", [[1, 2, 3], [4, 5, 6]]),
        "turned": reals("F32", [[1, 2], [3, 4]]),
        "unlike": dense("I32", [1, 2]),
    }
    tuned = {
        "grown": reals("BF16", [[1, 2, 0], [3, 4.5, 0], [0, 0, 7]]),
        "kept": reals("F32", [1]),
        "new": reals("F16", [[1, -1], [0, 2]]),
        "retyped": reals("BF16", [1.5, 1e-3, -2.5]),
        "shrunk": reals("F32", [[1, 2]]),
        "turned": reals("F32", [1, 2, 3, 4]),
        "unlike": dense("U8", [1, 2, 3]),
    }
    more = {
        "shards": {"model-1.safetensors": b"header of the first " * 4, "model-2.safetensors": b"short"},
        "files": [
            side_file("config.json", b'{"tie_word_embeddings": false}'),
            side_file("empty.txt", b""),
            side_file("tokenizer.json", b"as in the base", stored=False),
        ],
        "provenance": {"made_by": "pack", "note": "Größe", "nested": {"list": [1, 2.5, None, True]}},
    }
    return kind, base, tuned, more


def several_blocks(kind: str, dtype: str) -> Pair:
    """Four blocks of one row each, of which the second is null: a base tensor so small that the rest is zeros."""
    cols = (1 << 21) + 1
    base = dense(dtype, [1, 2], (1, 2))
    bits = np.zeros(4 * cols, DTYPES[dtype].carrier)
    bits[:2] = [1, 3]
    bits[[cols - 1, 2 * cols, 2 * cols + 5, 4 * cols - 1]] = 8
    return kind, {"w": base}, {"w": dense(dtype, bits, (4, cols))}, {}


def integers() -> Pair:
    base = dense("I8", noise(300, 256), (3, 100))
    return "patch", {"w": base}, {"w": moved(base, some(60, 300, 255))}, {"codecs": ("gaps", "steps")}


PAIRS: dict[str, Callable[[], Pair]] = {
    "vector-dtypes": lambda: ("vector", *every_dtype(FLOATS), {}),
    "patch-dtypes": lambda: ("patch", *every_dtype(list(DTYPES)), {}),
    "vector-f32": lambda: pair("vector", "F32", None, (40, 25), 150),
    "vector-bf16": lambda: pair("vector", "BF16", None, (40, 25), 150),
    "vector-f32-dense": lambda: pair("vector", "F32", None, (16, 12), 1000),
    "patch-f32": lambda: pair("patch", "F32", None, (40, 25), 150),
    "patch-bf16": lambda: pair("patch", "BF16", None, (40, 25), 150),
    "patch-bf16-full": lambda: (
        "patch",
        {"w": (base := weights("BF16", 120, (10, 12)))},
        {"w": moved(base, dict.fromkeys(range(120), 1))},
        {},
    ),
    "patch-zero-base": lambda: ("patch", {"w": dense("BF16", [0] * 64)}, {"w": dense("BF16", [0, 1] * 32)}, {}),
    "vector-gaps-floats": lambda: pair("vector", "F32", ("gaps", "floats"), (20, 30), 80),
    "vector-plain-plain": lambda: pair("vector", "F32", ("plain", "plain"), (20, 30), 40),
    "vector-gaps-packed": lambda: pair("vector", "BF16", ("gaps", "packed"), (20, 30), 40),
    "vector-paper64-plain": lambda: pair("vector", "F32", ("paper64", "plain"), (20, 30), 40),
    "patch-exponents-steps": lambda: pair("patch", "BF16", ("exponents", "steps"), (30, 40), 200),
    "patch-exponents-steps-f32": lambda: pair("patch", "F32", ("exponents", "steps"), (20, 30), 80),
    "patch-gaps-steps-i8": integers,
    "patch-exponents-floats": lambda: pair("patch", "F32", ("exponents", "floats"), (20, 30), 80),
    "patch-plain-packed": lambda: pair("patch", "F8_E4M3", ("plain", "packed"), (20, 30), 40),
    "patch-paper64-plain": lambda: pair("patch", "F16", ("paper64", "plain"), (20, 30), 40),
    "vector-exceptions": exceptions,
    "vector-shapes-and-names": shapes_and_names,
    "vector-structure": lambda: structure("vector"),
    "patch-structure": lambda: structure("patch"),
    "vector-blocks": lambda: several_blocks("vector", "F8_E4M3"),
    "patch-blocks": lambda: several_blocks("patch", "BOOL"),
    "patch-no-change": lambda: ("patch", {"w": reals("F32", [1])}, {"w": reals("F32", [1])}, {}),
}


def merged(path: Path) -> None:
    """A vector that no checkpoint stands behind: no base at hand, no result, explicit zeros of both signs."""
    header = Header(
        "vector", Identity("base", "ba5e" * 16), None, (), provenance={"made_by": "merge", "weights": [0.5]}
    )
    with LotaWriter(path, header) as writer:
        for name, eligible, bits in (("a", True, [0, MINUS_ZERO, 0x3F000000]), ("b", False, [1, 0, 0xC0000000])):
            spec = TensorSpec.like(name, reals("BF16", [[0] * 3] * 2).form, eligible=eligible)
            delta = SparseTensor((6,), np.array([0, 2, 5]), np.array(bits, "<u4").view("<f4"))
            change = Change(delta, SparseTensor.empty((6,), "<u2"))
            writer.add(spec, blocks_of("vector", spec, change, None))
        writer.add(TensorSpec.like("c", reals("F32", [1]).form), [(None, b"")])


def escapes(path: Path) -> None:
    """`paper64` where 12 bits do not hold a row, a column or their differences."""
    header = Header("vector", Identity("base", "ba5e" * 16), None, ())
    positions = {
        "columns": ((3, 10_000), [0, 4095, 4096, 8191, 9999, 10_000, 14_096, 24_191, 24_192]),
        "rows": ((9_000, 2), [1, 2 * 4094, 2 * 8188 + 1, 2 * 8189, 17_998, 17_999]),
        "rows-beyond": ((9_000, 2), [2 * 4095, 2 * 8190 + 1, 17_999]),
        "vector": ((9_000,), [0, 1, 4095, 8190, 8999]),
    }
    with LotaWriter(path, header) as writer:
        for name, (shape, places) in sorted(positions.items()):
            spec = TensorSpec(name, DTYPES["F32"], shape, None)
            delta = SparseTensor((spec.size,), np.array(places), np.arange(1, len(places) + 1, dtype="<f4"))
            change = Change(delta, SparseTensor.empty((spec.size,), "<u4"))
            writer.add(spec, blocks_of("vector", spec, change, None, ("paper64", "plain")))


def later_version(path: Path) -> None:
    """A file of a later minor version: what this one does not know is passed over."""
    parts = Parts.of(write_good(path, "vector"))
    parts.description |= {"version": "1.7", "surprise": [1]}
    parts.description["base"]["surprise"] = 1
    parts.index["surprise"] = None
    parts.tensor("w")["surprise"] = {"a": 1}
    parts.save(path)


OTHERS = {"vector-merged": merged, "vector-paper64-escapes": escapes, "vector-version-1.7": later_version}


def write_all(folder: Path) -> None:
    """Every golden file under `folder`."""
    for part in ("valid", "invalid"):
        (folder / part).mkdir(exist_ok=True)
    for name, content in PAIRS.items():
        kind, base, tuned, more = content()
        path, base_path = folder / "valid" / f"{name}.lota", folder / "valid" / f"{name}.base.safetensors"
        save_tensors(base_path, base)
        write_pair(path, kind, base, tuned, **more)
        _describe(path, base_path)
    for name, write in OTHERS.items():
        path = folder / "valid" / f"{name}.lota"
        write(path)
        _describe(path, None)
    for name, defect in DEFECTS.items():
        defect.write(folder / "invalid" / f"{name}.lota")
    errors = {name: defect.error.__name__ for name, defect in sorted(DEFECTS.items())}
    (folder / "invalid" / "errors.json").write_text(json.dumps(errors, indent=1) + "\n", encoding="utf-8")


def _describe(path: Path, base: Path | None) -> None:
    text = json.dumps(read(path, base), ensure_ascii=False, indent=1)
    # a list of numbers or of digits is one line
    text = re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match[0].split()), text)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_all(FOLDER)
