"""Whole checkpoints: what pack stores, unpack gives back byte for byte, shards and side files included."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from support import merge_oracle as naive
from support import oracle
from support.building import Tensor, contents, package, tensor, write_checkpoint, write_shard
from support.models import make_architecture, perturb

from taskvec import Applied, Checkpoint, TaskVector, apply, diff, merge, overlap, pack
from taskvec.applying.apply import check_result
from taskvec.errors import AlreadyAppliedError, BaseMismatchError, DiffError, KindError, MergeError
from taskvec_formats import ModelFolder
from taskvec_formats.blocks import CODECS
from taskvec_formats.dtypes import DTYPES
from taskvec_formats.errors import NotSafetensorsError
from taskvec_formats.forms import BLOCK_ELEMENTS

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
both_kinds = pytest.mark.parametrize("kind", ["vector", "patch"])
every_codec = pytest.mark.parametrize("codec", CODECS)


def stored(folder: Path, base: Checkpoint, tuned: Checkpoint, kind: str, codec: str = "auto") -> TaskVector:
    """The difference after a round trip through a file."""
    diff(base, tuned, kind=kind).save(folder / f"{kind}.lota", codec=codec)
    once = pack(base, tuned, folder / "once.lota", kind=kind, codec=codec, force=True)
    assert once == TaskVector.open(folder / f"{kind}.lota")
    assert (folder / "once.lota").read_bytes() == (folder / f"{kind}.lota").read_bytes()
    return TaskVector.open(folder / f"{kind}.lota")


def comes_back(folder: Path, base: Path, tuned: Path, kind: str, codec: str = "auto") -> TaskVector:
    """Pack, save, open and apply; every file of the folder `tuned` must be there again, and no other."""
    vector = stored(folder, ModelFolder(base), ModelFolder(tuned), kind, codec)
    assert apply(vector, ModelFolder(base), folder / f"out-{kind}") == Applied(True)
    assert package(folder / f"out-{kind}") == package(tuned)
    check_result(vector, ModelFolder(base))
    return vector


def noise(*shape: int) -> Any:
    return RNG.normal(size=shape)


def fine_tune(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Some elements of every tensor moved to the next bit pattern but two."""
    tuned = {}
    for name, each in tensors.items():
        bits = each.bits.copy()
        bits[::3] += 3
        tuned[name] = each._replace(bits=bits)
    return tuned


EMBEDDINGS = noise(12, 6)
MODEL = {
    "embed.weight": tensor("F32", EMBEDDINGS),
    "layers.0.weight": tensor("BF16", noise(7, 5)),
    "layers.1.weight": tensor("F16", noise(5, 7)),
    "norm.weight": tensor("F64", noise(6)),
    "position_ids": tensor("I64", np.arange(9)),
    "scale": tensor("F32", 1.5),
    "unused": tensor("F32", np.zeros((0, 4))),
}
TUNED = fine_tune(MODEL)
FILES = {"config.json": b'{"a": 1}\n', "tokenizer.json": b"{}", "README.md": b""}

# base, tuned: tensors, number of shards, side files
Half = tuple[Mapping[str, Tensor], int, Mapping[str, bytes]]
PAIRS: dict[str, tuple[Half, Half]] = {
    "one shard": ((MODEL, 1, FILES), (TUNED, 1, FILES)),
    "several shards": ((MODEL, 3, FILES), (TUNED, 3, FILES)),
    "split": ((MODEL, 1, FILES), (TUNED, 4, FILES)),
    "joined": ((MODEL, 4, FILES), (TUNED, 1, FILES)),
    "sharded differently": ((MODEL, 2, FILES), (TUNED, 3, FILES)),
    "tensors in another order": ((MODEL, 2, FILES), (dict(reversed(TUNED.items())), 2, FILES)),
    "more rows": ((MODEL, 1, FILES), ({**TUNED, "embed.weight": tensor("F32", noise(15, 6))}, 1, FILES)),
    "fewer rows": ((MODEL, 1, FILES), ({**TUNED, "embed.weight": tensor("F32", noise(9, 6))}, 1, FILES)),
    "other columns": ((MODEL, 1, FILES), ({**TUNED, "embed.weight": tensor("F32", noise(12, 8))}, 2, FILES)),
    "another rank": ((MODEL, 1, FILES), ({**TUNED, "embed.weight": tensor("F32", noise(72))}, 1, FILES)),
    "emptied": ((MODEL, 1, FILES), ({**TUNED, "embed.weight": tensor("F32", noise(0, 6))}, 1, FILES)),
    "filled": ((MODEL, 1, FILES), ({**TUNED, "unused": tensor("F32", noise(3, 4))}, 1, FILES)),
    "emptied otherwise": ((MODEL, 1, FILES), ({**MODEL, "unused": tensor("F32", noise(4, 0))}, 1, FILES)),
    "added": ((MODEL, 2, FILES), ({**TUNED, "head.weight": tensor("BF16", noise(12, 6))}, 2, FILES)),
    "added, empty": ((MODEL, 1, FILES), ({**TUNED, "more": tensor("F32", noise(0))}, 1, FILES)),
    "added zeros": ((MODEL, 1, FILES), ({**TUNED, "more": tensor("F32", np.zeros(5))}, 1, FILES)),
    "removed": ((MODEL, 2, FILES), ({n: t for n, t in TUNED.items() if n != "norm.weight"}, 2, FILES)),
    "renamed": ((MODEL, 1, FILES), ({n.replace("embed", "tokens"): t for n, t in TUNED.items()}, 1, FILES)),
    "narrower": ((MODEL, 1, FILES), ({**TUNED, "embed.weight": tensor("BF16", EMBEDDINGS * 1.01)}, 1, FILES)),
    "only rounded": ((MODEL, 1, FILES), ({**MODEL, "embed.weight": tensor("BF16", EMBEDDINGS)}, 1, FILES)),
    "wider": ((MODEL, 1, FILES), ({**TUNED, "layers.0.weight": tensor("F32", noise(7, 5))}, 1, FILES)),
    "wider, resized": ((MODEL, 1, FILES), ({**TUNED, "layers.0.weight": tensor("F64", noise(9, 5))}, 1, FILES)),
    "integers of a float": ((MODEL, 1, FILES), ({**TUNED, "embed.weight": tensor("U8", np.eye(12, 6))}, 1, FILES)),
    "a narrower scalar": ((MODEL, 1, FILES), ({**TUNED, "scale": tensor("BF16", 2.5)}, 1, FILES)),
    "a wider scalar": ((MODEL, 1, FILES), ({**TUNED, "scale": tensor("F64", 2.5)}, 1, FILES)),
    "a scalar as a list": ((MODEL, 1, FILES), ({**TUNED, "scale": tensor("F32", [2.5])}, 1, FILES)),
    "nothing": ((MODEL, 1, FILES), (MODEL, 1, FILES)),
    "resharded alone": ((MODEL, 1, FILES), (MODEL, 3, FILES)),
    "files changed": ((MODEL, 1, FILES), (TUNED, 1, {**FILES, "config.json": b"{}", "README.md": b"# Tuned"})),
    "files added": ((MODEL, 1, {}), (TUNED, 1, FILES)),
    "files removed": ((MODEL, 2, FILES), (TUNED, 2, {"config.json": b""})),
    "files alone": ((MODEL, 1, FILES), (MODEL, 1, {**FILES, "chat_template.jinja": bytes(range(256)) * 40})),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_a_folder_comes_back_byte_for_byte(pair: tuple[Half, Half], tmp_path: Path) -> None:
    for name, half in zip(("base", "tuned"), pair, strict=True):
        write_checkpoint(tmp_path / name, *half)
    for kind in ("vector", "patch"):
        comes_back(tmp_path, tmp_path / "base", tmp_path / "tuned", kind)


@both_kinds
@every_codec
@pytest.mark.parametrize("size", [(40, 50), (300, 70)], ids=["few", "many"])
def test_every_codec_gives_the_folder_back(kind: str, codec: str, size: tuple[int, int], tmp_path: Path) -> None:
    """Weights and steps of usual sizes, few and so many that codecs are chosen by a sample."""
    rng = np.random.default_rng(1)
    weights, steps = rng.normal(size=size) * 0.02, rng.normal(size=size) * 2e-5
    floats = [name for name, dtype in DTYPES.items() if dtype.additive]
    write_checkpoint(tmp_path / "base", {name: tensor(name, weights) for name in floats})
    write_checkpoint(tmp_path / "tuned", {name: tensor(name, weights + steps) for name in floats})
    vector = comes_back(tmp_path, tmp_path / "base", tmp_path / "tuned", kind, codec)
    if codec != "auto":
        blocks = [block for spec in vector.specs.values() for block in spec.blocks if block]
        parts = [part for block in blocks for part in (block.delta, block.replacements) if part]
        assert {part.positions.codec for part in parts} == {{"fast": "gaps"}.get(codec, codec)}
        assert {part.values.codec for part in parts} == {"plain"}


def specials(name: str) -> Tensor:
    """Every kind of bit pattern that a dtype has: all of one byte, else those around zero, infinity and NaN."""
    dtype = DTYPES[name]
    if dtype.itemsize == 1:
        bits = np.arange(256)
    else:
        sign = 1 << 8 * dtype.itemsize - 1
        corners = [0, 1, 2, sign - 2, sign - 1]
        if dtype.mantissa:
            infinity = int(np.array([np.inf]).astype(dtype.real).view(dtype.carrier)[0])
            one = int(np.array([1.0]).astype(dtype.real).view(dtype.carrier)[0])
            # the largest numbers, infinity, NaN that signal and NaN with a payload; the smallest normal numbers
            corners += [infinity + step for step in (-1, 0, 1, 5)] + [infinity | 1 << dtype.mantissa - 1, one, one + 1]
            corners += [(1 << dtype.mantissa) - 1, 1 << dtype.mantissa]
        bits = np.array([half + corner for half in (0, sign) for corner in corners], np.uint64)
    return Tensor(dtype, (len(bits),), bits.astype(dtype.carrier))


@both_kinds
@every_codec
def test_every_bit_pattern_of_every_dtype_becomes_every_other(kind: str, codec: str, tmp_path: Path) -> None:
    base, tuned = {}, {}
    for name in DTYPES:
        each = specials(name)
        before, after = np.repeat(each.bits, min(len(each.bits), 16)), np.tile(each.bits, min(len(each.bits), 16))
        base[name], tuned[name] = (Tensor(each.dtype, (len(bits),), bits) for bits in (before, after))
        base[f"{name} scalar"] = Tensor(each.dtype, (), each.bits[-1:])
        tuned[f"{name} scalar"] = Tensor(each.dtype, (), each.bits[1:2])
        base[f"{name} empty"] = tuned[f"{name} empty"] = Tensor(each.dtype, (2, 0, 3), each.bits[:0])
    write_checkpoint(tmp_path / "base", base, 2)
    write_checkpoint(tmp_path / "tuned", tuned)
    comes_back(tmp_path, tmp_path / "base", tmp_path / "tuned", kind, codec)


@both_kinds
@pytest.mark.parametrize("target", [name for name, dtype in DTYPES.items() if dtype.additive])
def test_special_values_survive_another_dtype(kind: str, target: str, tmp_path: Path) -> None:
    floats = {name: specials(name) for name, dtype in DTYPES.items() if dtype.additive}
    size = min(each.bits.size for each in floats.values())
    after = specials(target).bits
    write_checkpoint(tmp_path / "base", floats)
    retyped = {name: Tensor(DTYPES[target], (size,), np.roll(after, shift)[:size]) for shift, name in enumerate(floats)}
    write_checkpoint(tmp_path / "tuned", retyped)
    comes_back(tmp_path, tmp_path / "base", tmp_path / "tuned", kind)


def lone(path: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    return ModelFolder(write_shard(path, tensors, {"format": "pt"}))


@both_kinds
def test_lone_files_come_back_under_the_name_of_the_base(kind: str, tmp_path: Path) -> None:
    base, tuned = lone(tmp_path / "base.safetensors", MODEL), lone(tmp_path / "tuned.safetensors", TUNED)
    vector = stored(tmp_path, base, tuned, kind)
    assert apply(vector, base, tmp_path / "out") == Applied(True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["base.safetensors"]
    assert (tmp_path / "out" / "base.safetensors").read_bytes() == tuned.path.read_bytes()


@both_kinds
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_comes_back_on_a_lone_file(kind: str, shards: int, tmp_path: Path) -> None:
    lone(tmp_path / "base.safetensors", MODEL)
    write_checkpoint(tmp_path / "tuned", TUNED, shards, FILES)
    comes_back(tmp_path, tmp_path / "base.safetensors", tmp_path / "tuned", kind)


@both_kinds
@pytest.mark.parametrize("shards", [1, 3])
def test_a_lone_file_comes_back_on_a_folder(kind: str, shards: int, tmp_path: Path) -> None:
    """The model's weights are those of the file; a folder that cannot be opened would be no model."""
    base = write_checkpoint(tmp_path / "base", MODEL, shards, FILES)
    tuned = lone(tmp_path / "tuned.safetensors", TUNED)
    vector = stored(tmp_path, base, tuned, kind)
    assert apply(vector, base, tmp_path / "out") == Applied(True)
    result = ModelFolder(tmp_path / "out")
    assert contents(result) == contents(tuned)
    assert [shard.path.read_bytes() for shard in result.shards] == [tuned.path.read_bytes()]
    for name, content in FILES.items():
        assert (tmp_path / "out" / name).read_bytes() == content


@both_kinds
def test_an_empty_tensor_may_end_a_file_at_the_end_of_a_page(kind: str, tmp_path: Path) -> None:
    """Nothing is mapped behind it."""
    tensors = {"a": tensor("U8", np.arange(4096) % 256), "b": tensor("F32", np.zeros((0, 2)))}
    padding = ""
    for name in ("base", "tuned"):
        path = tmp_path / f"{name}.safetensors"
        for _ in range(2):  # the first is written to be measured
            write_shard(path, tensors, {"padding": padding})
            padding += "x" * (-path.stat().st_size % 4096)
        assert path.stat().st_size % 4096 == 0
        tensors = {**fine_tune({"a": tensors["a"]}), "b": tensors["b"]}
    base, tuned = (ModelFolder(tmp_path / f"{name}.safetensors") for name in ("base", "tuned"))
    assert apply(stored(tmp_path, base, tuned, kind), base, tmp_path / "out") == Applied(True)
    assert contents(ModelFolder(tmp_path / "out")) == contents(tuned)


def test_resizing_stores_the_new_rows_alone(tmp_path: Path) -> None:
    """What both shapes share is measured from the base, what is new from zero."""
    before = noise(6, 4).astype(np.float32)
    after = oracle.taken(before, (9, 4))
    after[2, 1] += 1
    after[6:8] = 0.5
    base = write_checkpoint(tmp_path / "base", {"w": tensor("F32", before), "v": tensor("BF16", before)})
    tuned = write_checkpoint(
        tmp_path / "tuned", {"w": tensor("F32", after), "v": tensor("F32", oracle.taken(before, (5, 4)))}
    )
    vector = stored(tmp_path, base, tuned, "vector")
    assert vector["w"].indices.tolist() == [9, *range(24, 32)]
    rounded_away = tensor("BF16", before[:5]).bits.view(DTYPES["BF16"].real).astype(np.float32) != before[:5].ravel()
    assert vector["v"].indices.tolist() == np.flatnonzero(rounded_away).tolist()


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "bert"])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")])
def test_models_as_transformers_saves_them_come_back(
    architecture: str, dtypes: tuple[str, str], tmp_path: Path
) -> None:
    base = make_architecture(architecture, tmp_path / "base", dtype=dtypes[0])
    perturb(base, tmp_path / "tuned", dtype=dtypes[1], shard_size="10KB")
    assert len(ModelFolder(tmp_path / "tuned").shards) > 1
    for kind in ("vector", "patch"):
        comes_back(tmp_path, base, tmp_path / "tuned", kind)


@st.composite
def halves(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two checkpoints: some tensors common, changed anywhere, everywhere or nowhere, some resized, retyped or alone."""
    dtypes = st.sampled_from(list(DTYPES.values()))

    def any_tensor() -> Tensor:
        dtype, shape = draw(dtypes), draw(oracle.shapes())
        return Tensor(dtype, shape, draw(oracle.carriers(dtype, math.prod(shape))))

    common = any_tensor()
    other = draw(oracle.carriers(common.dtype, common.bits.size))
    moved = common._replace(bits=np.where(draw(nps.arrays(np.bool_, common.bits.size)), other, common.bits))
    base, tuned = {"common": common}, {"common": moved}
    for name in draw(st.sets(st.sampled_from("xyz"))):
        owners = draw(st.sampled_from([(base,), (tuned,), (base, tuned)]))
        for owner in owners:
            owner[name] = any_tensor()
    return base, tuned


@both_kinds
@every_codec
@settings(max_examples=25)
@given(pair=halves(), shards=st.tuples(*2 * [st.integers(1, 3)]))
def test_any_pair_of_checkpoints_comes_back(
    kind: str, codec: str, pair: tuple[dict[str, Tensor], dict[str, Tensor]], shards: tuple[int, int]
) -> None:
    with TemporaryDirectory() as folder:
        for name, tensors, count in zip(("base", "tuned"), pair, shards, strict=True):
            write_checkpoint(Path(folder, name), tensors, min(count, len(tensors)))
        comes_back(Path(folder), Path(folder, "base"), Path(folder, "tuned"), kind, codec)


@pytest.mark.parametrize("dtype", ["U8", "BF16"])
def test_tensors_of_several_blocks_come_back(dtype: str, tmp_path: Path) -> None:
    """Changes at both sides of every border, a block of none; read across the borders too."""
    size = 3 * BLOCK_ELEMENTS + 100
    before = np.random.default_rng(2).integers(0, 200, size).astype(DTYPES[dtype].carrier)
    after = before.copy()
    held = [0, BLOCK_ELEMENTS - 1, 2 * BLOCK_ELEMENTS, 3 * BLOCK_ELEMENTS - 1, 3 * BLOCK_ELEMENTS, size - 1]
    after[held] += 7
    base, tuned = (
        write_checkpoint(tmp_path / name, {"w": Tensor(DTYPES[dtype], (size,), bits)})
        for name, bits in (("base", before), ("tuned", after))
    )
    for kind in ("vector", "patch"):
        vector = comes_back(tmp_path, tmp_path / "base", tmp_path / "tuned", kind)
        assert [block is None for block in vector.specs["w"].blocks] == [False, True, False, False]
        across = vector.source.change("w", 5, size - 1, base.bits("w")).touched()
        assert (across + 5).tolist() == held[1:-1]
        with pytest.raises(AlreadyAppliedError, match="tensor 'w'"):
            apply(vector, tuned, tmp_path / "twice")


def test_rows_are_never_cut_by_blocks(tmp_path: Path) -> None:
    shape = (3, BLOCK_ELEMENTS // 2 + 1)
    before = np.zeros(math.prod(shape), np.uint8)
    after = before.copy()
    after[:: shape[1] - 1] = 1
    for name, bits in (("base", before), ("tuned", after)):
        write_checkpoint(tmp_path / name, {"w": Tensor(DTYPES["U8"], shape, bits)})
    vector = comes_back(tmp_path, tmp_path / "base", tmp_path / "tuned", "vector")
    assert list(vector.specs["w"].form.blocks()) == [(row * shape[1], (row + 1) * shape[1]) for row in range(3)]


# stacking


def usual(dtype: str, seed: int, shape: tuple[int, int] = (64, 48)) -> Tensor:
    return tensor(dtype, np.random.default_rng(seed).normal(size=shape) * 0.02)


def disjoint_halves(folder: Path, dtype: str, kind: str) -> tuple[Checkpoint, list[TaskVector]]:
    """A base and two vectors of it that touch the even and the odd rows of one tensor, and one tensor each alone."""
    tensors = {name: usual(dtype, seed) for seed, name in enumerate(("both", "first", "second"))}
    base = write_checkpoint(folder / "base", tensors)
    vectors = []
    for number, name in enumerate(("first", "second")):
        both = tensors["both"].bits.reshape(64, 48).copy()
        both[number::2, ::3] ^= 1
        alone = tensors[name].bits.copy()
        alone[number::5] ^= 1
        half = {
            **tensors,
            "both": tensors["both"]._replace(bits=both.ravel()),
            name: tensors[name]._replace(bits=alone),
        }
        tuned = write_checkpoint(folder / name, half)
        diff(base, tuned, kind=kind).save(folder / f"{name}.lota")
        vectors.append(TaskVector.open(folder / f"{name}.lota"))
    return base, vectors


@both_kinds
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_vectors_whose_masks_do_not_meet_stack_in_either_order(kind: str, dtype: str, tmp_path: Path) -> None:
    base, (first, second) = disjoint_halves(tmp_path, dtype, kind)
    results = []
    for order in ((first, second), (second, first)):
        state = base
        for step, vector in enumerate(order):
            out = tmp_path / f"{order[0].name}-{step}"
            check_result(vector, state)
            # the second meets weights that its base had not
            assert apply(vector, state, out).exact is (step == 0)
            state = ModelFolder(out)
        results.append(contents(state))
    assert results[0] == results[1]

    expected = {name: base.bits(name).copy() for name in base.tensors}
    for half in ("first", "second"):
        for name, bits in expected.items():
            changed = ModelFolder(tmp_path / half).bits(name)
            bits[changed != base.bits(name)] = changed[changed != base.bits(name)]
    assert {name: bits.tobytes().hex() for name, bits in expected.items()} == {n: c[2] for n, c in results[0].items()}
    if kind == "vector":
        merged = merge([first, second])
        assert merged.provenance["method"] == "disjoint"
        apply(merged, base, tmp_path / "merged")
        # flips of the last bit are differences that f32 holds, so that nothing of them is lost in a sum
        assert contents(ModelFolder(tmp_path / "merged")) == results[0]


@both_kinds
def test_a_vector_meets_only_what_it_expects(kind: str, tmp_path: Path) -> None:
    """Other weights where it changes them: one vector of two whose masks meet after the other."""
    base, (first, _) = disjoint_halves(tmp_path, "BF16", kind)
    bits = base.bits("first").copy()
    bits[0] ^= 2
    tensors = {name: Tensor(info.dtype, info.shape, base.bits(name)) for name, info in base.tensors.items()}
    other = write_checkpoint(tmp_path / "other", {**tensors, "first": tensors["first"]._replace(bits=bits)})
    for refuse in (check_result, lambda v, b: apply(v, b, tmp_path / "out")):
        with pytest.raises(BaseMismatchError, match=r"other is not the base of first.lota .*tensor 'first' has other"):
            refuse(first, other)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("codec", ["auto", "plain"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F8_E4M3", "I8"])
@both_kinds
def test_a_wrong_base_is_not_taken_for_a_damaged_file(kind: str, dtype: str, codec: str, tmp_path: Path) -> None:
    """What is stored relative to the base cannot be decoded beside another one, which is no fault of the file."""
    weights = np.random.default_rng(3).normal(size=(200, 90)) * (0.02 if DTYPES[dtype].additive else 40)
    steps = np.random.default_rng(4).normal(size=weights.shape) * (2e-4 if DTYPES[dtype].additive else 1)
    base = write_checkpoint(tmp_path / "base", {"w": tensor(dtype, weights)})
    tuned = write_checkpoint(tmp_path / "tuned", {"w": tensor(dtype, weights + steps)})
    vector = stored(tmp_path, base, tuned, kind, codec)
    with pytest.raises(AlreadyAppliedError, match=rf"{kind}.lota is applied to tuned already: tensor 'w'"):
        check_result(vector, tuned)
    for name, values in (("other", weights[::-1]), ("zeros", np.zeros_like(weights))):
        other = write_checkpoint(tmp_path / name, {"w": tensor(dtype, values)})
        with pytest.raises(BaseMismatchError, match=rf"{name} is not the base of {kind}.lota .*tensor 'w' has other"):
            apply(vector, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@both_kinds
def test_another_revision_of_the_base_is_named_as_such(kind: str, tmp_path: Path) -> None:
    """Where shards are laid out anew, every tensor must be there, also those that the vector leaves alone."""
    base = write_checkpoint(tmp_path / "base", {**MODEL, "frozen": tensor("F32", [1, 2])}, 1)
    tuned = write_checkpoint(tmp_path / "tuned", {**TUNED, "frozen": tensor("F32", [1, 2])}, 2)
    vector = stored(tmp_path, base, tuned, kind)
    for name, tensors in {
        "less": MODEL,
        "more": {**MODEL, "frozen": tensor("F32", [1, 2]), "own": tensor("F32", [1])},
        "retyped": {**MODEL, "frozen": tensor("F16", [1, 2])},
    }.items():
        with pytest.raises(BaseMismatchError, match=name):
            apply(vector, write_checkpoint(tmp_path / name, tensors), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# merges, which vouch for no elements of a base


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Checkpoint, TaskVector]:
    base, vectors = disjoint_halves(tmp_path, "F32", "vector")
    merge(vectors, weights=[1, 0.5]).save(tmp_path / "merged.lota")
    return base, TaskVector.open(tmp_path / "merged.lota")


def test_a_merge_knows_no_tuned_checkpoint(merged: tuple[Checkpoint, TaskVector], tmp_path: Path) -> None:
    base, vector = merged
    assert vector.header.tuned is None
    assert all(block.before is None for spec in vector.specs.values() for block in spec.blocks)
    assert apply(vector, base, tmp_path / "out") == Applied(None)
    for name in vector:
        expected = oracle.applied(DTYPES["F32"], base.bits(name), oracle.entries(vector[name]), {})
        assert ModelFolder(tmp_path / "out").bits(name).tolist() == expected


def test_a_merge_refuses_its_own_result(merged: tuple[Checkpoint, TaskVector], tmp_path: Path) -> None:
    base, vector = merged
    apply(vector, base, tmp_path / "out")
    for refuse in (check_result, lambda v, b: apply(v, b, tmp_path / "twice")):
        with pytest.raises(
            BaseMismatchError, match=r"out is not the base of merged.lota .*tensor 'both' has other values"
        ):
            refuse(vector, ModelFolder(tmp_path / "out"))
    assert not (tmp_path / "twice").exists()


def test_a_merge_checks_whole_tensors(merged: tuple[Checkpoint, TaskVector], tmp_path: Path) -> None:
    base, vector = merged
    tensors = {name: Tensor(info.dtype, info.shape, base.bits(name)) for name, info in base.tensors.items()}
    untouched = next(i for i in range(base.tensors["second"].form.size) if i not in vector["second"].indices)
    bits = base.bits("second").copy()
    bits[untouched] ^= 1
    other = write_checkpoint(tmp_path / "other", {**tensors, "second": tensors["second"]._replace(bits=bits)})
    with pytest.raises(BaseMismatchError, match="tensor 'second' has other values"):
        apply(vector, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_of_sparse_vectors_adds_up_on_the_base(tmp_path: Path) -> None:
    tensors = {"w": usual("BF16", 0)}
    base = write_checkpoint(tmp_path / "base", tensors)
    tuned = [write_checkpoint(tmp_path / f"tuned{seed}", {"w": usual("BF16", seed)}) for seed in (1, 2)]
    vectors = [diff(base, each, 0.9) for each in tuned]
    assert apply(merge(vectors, "linear"), base, tmp_path / "out") == Applied(None)
    summed = naive.combined("linear", [vector["w"] for vector in vectors], [1, 1], {})
    assert summed is not None
    expected = oracle.applied(DTYPES["BF16"], base.bits("w"), summed, {})
    assert ModelFolder(tmp_path / "out").bits("w").tolist() == expected


# patches, which hold no deltas


def test_patches_are_refused_where_deltas_are_needed(tmp_path: Path) -> None:
    _, patches = disjoint_halves(tmp_path, "BF16", "patch")
    with pytest.raises(
        KindError, match=r"first.lota is a patch: it contains new bits, not deltas; use `kind=vector` instead"
    ):
        merge(patches)
    with pytest.raises(KindError, match=r"first.lota is a patch: it contains new bits, not deltas"):
        overlap(patches)


REFUSED = {
    "resized": ("more rows", r"'embed.weight' is F32 \[15, 6\] but is F32 \[12, 6\] in the base"),
    "retyped": ("narrower", r"'embed.weight' is BF16 \[12, 6\] but is F32 \[12, 6\] in the base"),
    "added": ("added", r"'head.weight' is BF16 \[12, 6\] but is not in the base"),
    "removed": ("removed", "removes tensor 'norm.weight'"),
}


@pytest.mark.parametrize(("pair", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_changes_of_form_are_not_added_up(pair: str, message: str, tmp_path: Path) -> None:
    base, tuned = (write_checkpoint(tmp_path / str(i), *half) for i, half in enumerate(PAIRS[pair]))
    with pytest.raises(MergeError, match=f"{message}.*cannot be added"):
        merge([diff(base, tuned)])
    with pytest.raises(DiffError, match="tensor"):
        diff(base, tuned, 0.5)


# threads


@contextmanager
def threads(count: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TASKVEC_THREADS", str(count))
        yield


def made(folder: Path, states: list[Path], count: int) -> dict[str, dict[str, str]]:
    """The hashes of all that pack, merge and unpack write with so many threads."""
    out = folder / str(count)
    out.mkdir()
    base, *tuned = map(ModelFolder, states)
    with threads(count):
        for number, each in enumerate(tuned):
            for kind in ("vector", "patch"):
                diff(base, each, kind=kind).save(out / f"{number}.{kind}.lota")
        diff(base, tuned[0], 0.8).save(out / "sparse.lota")
        merge([TaskVector.open(out / f"{number}.vector.lota") for number in range(2)]).save(out / "merged.lota")
        for path in sorted(out.glob("*.lota")):
            apply(TaskVector.open(path), base, folder / f"{count}-{path.stem}")
    folders = [out, *(folder / f"{count}-{path.stem}" for path in sorted(out.glob("*.lota")))]
    return {path.name.removeprefix(str(count)): package(path) for path in folders}


def test_the_number_of_threads_does_not_show_in_what_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    big = rng.integers(0, 250, BLOCK_ELEMENTS + 999).astype(np.uint8)
    states = []
    for number in range(3):
        tensors = {f"layers.{i}.weight": usual("BF16", 10 * number + i) for i in range(12)}
        moved = big.copy()
        moved[number::100_003] += 1
        tensors["big"] = Tensor(DTYPES["F8_E4M3"], (len(big),), moved)
        write_checkpoint(tmp_path / f"state{number}", tensors, 2, {"config.json": str(number).encode()})
        states.append(tmp_path / f"state{number}")
    expected = made(tmp_path, states, 1)
    assert len(expected) == 1 + 6
    assert made(tmp_path, states, 2) == expected
    assert made(tmp_path, states, 5) == expected


@pytest.mark.parametrize("changed", ["base/model.safetensors", "x.lota"])
def test_an_input_that_is_cut_off_at_any_moment_leaves_the_whole_result_or_none(changed: str, tmp_path: Path) -> None:
    tensors = {f"w{number}": tensor("F32", noise(4, 4)) for number in range(3)}
    outcomes = []
    for moment in range(100):
        folder = tmp_path / str(moment)
        folder.mkdir()
        base = write_checkpoint(folder / "base", tensors)
        tuned = write_checkpoint(folder / "tuned", fine_tune(tensors), 1, {"config.json": b"{}"})
        diff(base, tuned).save(folder / "x.lota")
        calls = 0

        def progress(*_: object, moment: int = moment, folder: Path = folder) -> None:
            nonlocal calls
            if calls == moment:
                os.truncate(folder / changed, 100)
            calls += 1

        try:
            apply(TaskVector.open(folder / "x.lota"), base, folder / "out", progress=progress)
        except NotSafetensorsError:
            assert sorted(os.listdir(folder)) == ["base", "tuned", "x.lota"]
            outcomes.append(False)
        else:
            assert package(folder / "out") == package(folder / "tuned")
            outcomes.append(True)
        if calls <= moment:
            break
    assert set(outcomes) == {False, True}
