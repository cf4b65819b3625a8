"""tuned − base, saved, opened and applied to the base, is tuned; to anything else it is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import oracle
from support.building import Tensor, contents, package, tensor, write_checkpoint

import taskvec
from taskvec import Applied, Checkpoint, TaskVector, apply, diff
from taskvec.applying.apply import check_result
from taskvec.errors import AlreadyAppliedError, BaseMismatchError, DiffError, KindError, MaskError, UsageError
from taskvec.vectors.diff import layout_digest
from taskvec.vectors.source import Memory, Stored
from taskvec_formats import Form, Header, Identity, LotaReader, ModelFolder, SparseTensor, TensorSpec
from taskvec_formats.dtypes import DTYPES
from taskvec_formats.errors import ChecksumError, StreamError

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(8, 5))
STEPS = RNG.normal(size=(8, 5)) * 0.01 * (RNG.random((8, 5)) < 0.6)
States = tuple[dict[str, Tensor], dict[str, Tensor]]

SAME_DTYPE: dict[str, States] = {
    dtype: (
        {"a.weight": tensor(dtype, WEIGHTS), "b.weight": tensor(dtype, WEIGHTS[0]), "frozen": tensor(dtype, WEIGHTS)},
        {
            "a.weight": tensor(dtype, WEIGHTS + STEPS),
            "b.weight": tensor(dtype, WEIGHTS[0] * 1.5),
            "frozen": tensor(dtype, WEIGHTS),
        },
    )
    for dtype in ("F64", "F32", "F16", "BF16")
}
MIXED: States = (
    {
        "z.weight": tensor("F32", [[1.0, 0.0, -0.0], [1e-45, np.inf, 3e38]]),
        "a.weight": tensor("BF16", WEIGHTS),
        "empty": tensor("F32", np.zeros((0, 3))),
        "flags": tensor("BOOL", [True, False]),
        "ids": tensor("I64", [1, -2, 3]),
        "scalar": tensor("F32", 2.0),
        "still": tensor("I32", [7]),
    },
    {
        "z.weight": tensor("F32", [[1.5, -0.0, np.nan], [-1e-45, 1.0, -3e38]]),
        "a.weight": tensor("BF16", WEIGHTS + STEPS),
        "empty": tensor("F32", np.zeros((0, 3))),
        "flags": tensor("BOOL", [False, False]),
        "ids": tensor("I64", [1, 2**62, 3]),
        "scalar": tensor("F32", -2.0),
        "still": tensor("I32", [7]),
    },
)
STATES = {**SAME_DTYPE, "mixed": MIXED}
F32 = SAME_DTYPE["F32"]
every_state = pytest.mark.parametrize("states", STATES.values(), ids=STATES.keys())
both_kinds = pytest.mark.parametrize("kind", ["vector", "patch"])


def pack(
    folder: Path, states: States, sparsity: float | None = None, kind: str = "vector"
) -> tuple[Checkpoint, TaskVector]:
    """The base, and the vector as it is after a round trip through a file."""
    base, tuned = (write_checkpoint(folder / name, s) for name, s in zip(("base", "tuned"), states, strict=True))
    diff(base, tuned, sparsity, kind=kind).save(folder / "vector.lota")
    taskvec.pack(base, tuned, folder / "once.lota", sparsity, kind=kind)
    assert (folder / "once.lota").read_bytes() == (folder / "vector.lota").read_bytes()
    return base, TaskVector.open(folder / "vector.lota")


@every_state
@both_kinds
@pytest.mark.parametrize("shards", [(1, 1), (3, 2)], ids=["one shard", "other shards"])
def test_the_tuned_checkpoint_comes_back_to_the_bit(
    states: States, kind: str, shards: tuple[int, int], tmp_path: Path
) -> None:
    base = write_checkpoint(tmp_path / "base", states[0], shards[0])
    tuned = write_checkpoint(tmp_path / "tuned", states[1], shards[1])
    diff(base, tuned, kind=kind).save(tmp_path / "vector.lota")
    vector = TaskVector.open(tmp_path / "vector.lota")
    check_result(vector, base)
    check_result(vector, base)
    assert apply(vector, base, tmp_path / "out") == Applied(True)
    result = ModelFolder(tmp_path / "out")
    assert contents(result) == contents(tuned)
    assert result.fingerprint == tuned.fingerprint
    assert package(tmp_path / "out") == package(tmp_path / "tuned")


@every_state
def test_the_entries_are_those_of_the_definition(states: States, tmp_path: Path) -> None:
    base, vector = pack(tmp_path, states)
    changed = [name for name in base.tensors if states[0][name].bits.tobytes() != states[1][name].bits.tobytes()]
    assert list(vector) == changed
    for name in changed:
        before, after = states[0][name], states[1][name]
        found = oracle.entries(vector[name]), oracle.entries(vector.change(name).replacements)
        assert found == oracle.difference(before.dtype, before.bits, after.bits)
        assert vector[name].shape == before.shape


@every_state
def test_any_range_of_a_tensor_is_that_part_of_it(states: States, tmp_path: Path) -> None:
    _, vector = pack(tmp_path, states)
    for name, spec in vector.specs.items():
        whole = vector.change(name)
        for start, stop in [(0, spec.size), (1, spec.size), (0, spec.size - 1), (2, 2), (1, 4)]:
            if not start <= stop <= spec.size:
                continue
            part = vector.change(name, start, stop)
            for found, expected in ((part.delta, whole.delta), (part.replacements, whole.replacements)):
                shifted = {at - start: v for at, v in zip(expected.indices, expected.values, strict=True)}
                kept = {at: v.tobytes() for at, v in shifted.items() if 0 <= at < stop - start}
                assert {at: v.tobytes() for at, v in zip(found.indices, found.values, strict=True)} == kept


@every_state
def test_a_patch_holds_the_new_bits_of_what_changed(states: States, tmp_path: Path) -> None:
    base, patch = pack(tmp_path, states, kind="patch")
    for name, spec in patch.specs.items():
        before, after = states[0][name], states[1][name]
        change = patch.source.change(name, 0, spec.size, base.bits(name))
        assert len(change.delta) == spec.entries == 0
        assert oracle.entries(change.replacements) == oracle.changed(before.bits, after.bits)
        assert spec.replaced == len(change.replacements)


def test_a_patch_has_no_deltas(tmp_path: Path) -> None:
    _, patch = pack(tmp_path, F32, kind="patch")
    message = "vector.lota is a patch: it contains new bits, not deltas; use `kind=vector` instead"
    for read in (lambda: patch["a.weight"], lambda: patch.change("a.weight"), lambda: dict(patch)):
        with pytest.raises(KindError, match=f"^{message}$"):
            read()
    assert (list(patch), len(patch), patch.kind) == (["a.weight", "b.weight"], 2, "patch")
    with pytest.raises(KeyError):
        patch["frozen"]


@both_kinds
def test_the_same_checkpoints_give_the_same_bytes(kind: str, tmp_path: Path) -> None:
    pack(tmp_path, MIXED, kind=kind)
    base, tuned = (ModelFolder(tmp_path / name) for name in ("base", "tuned"))
    diff(base, tuned, kind=kind).save(tmp_path / "again.lota")
    assert (tmp_path / "again.lota").read_bytes() == (tmp_path / "vector.lota").read_bytes()


@every_state
def test_a_file_saved_again_is_the_same_file(states: States, tmp_path: Path) -> None:
    """Shards, side files and what the file vouches for come along."""
    base = write_checkpoint(tmp_path / "base", states[0], 2, {"config.json": b"{}", "old": b"1"})
    tuned = write_checkpoint(tmp_path / "tuned", states[1], 3, {"config.json": b"{}", "new": b"2"})
    diff(base, tuned).save(tmp_path / "vector.lota")
    TaskVector.open(tmp_path / "vector.lota").save(tmp_path / "again.lota")
    assert (tmp_path / "again.lota").read_bytes() == (tmp_path / "vector.lota").read_bytes()


def test_the_vector_knows_both_ends(tmp_path: Path) -> None:
    base, vector = pack(tmp_path, F32)
    tuned = ModelFolder(tmp_path / "tuned")
    assert (vector.base.name, vector.base.fingerprint) == ("base", base.fingerprint)
    assert (vector.header.tuned.name, vector.header.tuned.fingerprint) == ("tuned", tuned.fingerprint)
    assert (vector.name, vector.kind, vector.provenance) == (
        "vector.lota",
        "vector",
        {"made_by": "pack", "layout": layout_digest(base)},
    )
    for name, spec in vector.specs.items():
        assert (spec.base, spec.origin, spec.eligible) == (base.digest(name)[:16], base.tensors[name].form, True)
        assert base.digest(name) != tuned.digest(name)


@both_kinds
def test_an_unsaved_vector_applies_as_well(kind: str, tmp_path: Path) -> None:
    base, tuned = (write_checkpoint(tmp_path / name, s) for name, s in zip(("base", "tuned"), MIXED, strict=True))
    vector = diff(base, tuned, kind=kind)
    check_result(vector, base)
    assert apply(vector, base, tmp_path / "out") == Applied(True)
    assert contents(ModelFolder(tmp_path / "out")) == contents(tuned)


def test_an_unsaved_vector_refuses_another_base(tmp_path: Path) -> None:
    base, tuned = (write_checkpoint(tmp_path / name, s) for name, s in zip(("base", "tuned"), F32, strict=True))
    for kind in ("vector", "patch"):
        with pytest.raises(BaseMismatchError, match=r"^tuned is not the base .*'a\.weight' has other values"):
            apply(diff(base, tuned, kind=kind), tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@both_kinds
def test_equal_checkpoints_have_an_empty_vector(kind: str, tmp_path: Path) -> None:
    base, vector = pack(tmp_path, (MIXED[0], MIXED[0]), kind=kind)
    assert len(vector) == 0
    for out in (tmp_path / "out", tmp_path / "twice"):
        assert apply(vector, base, out) == Applied(True)
        base = ModelFolder(out)
    assert contents(base) == contents(ModelFolder(tmp_path / "base"))


def magnitudes(states: States) -> list[tuple[str, Any]]:
    """tuned − base of the tensors that can be added and that changed, f32."""
    pairs = [(name, states[0][name], states[1][name]) for name in sorted(states[0])]
    return [
        (name, (after.bits.view(after.dtype.real) - before.bits.view(before.dtype.real)).astype(np.float32))
        for name, before, after in pairs
        if before.dtype.additive and before.bits.tobytes() != after.bits.tobytes()
    ]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.97])
def test_a_sparsity_keeps_the_largest_changes_and_no_more(dtype: str, sparsity: float, tmp_path: Path) -> None:
    states = SAME_DTYPE[dtype]
    base, vector = pack(tmp_path, states, sparsity)
    deltas = magnitudes(states)
    eligible = sum(delta.size for _, delta in deltas)
    changes = sum(int(np.count_nonzero(delta)) for _, delta in deltas)
    k = min(round((1 - sparsity) * eligible), changes)
    assert vector.eligible == eligible == 45
    assert {name: kept.indices.tolist() for name, kept in vector.items()} == oracle.top_k(deltas, k)
    assert sum(map(len, vector.values())) == k

    assert apply(vector, base, tmp_path / "out") == Applied(None)
    result = ModelFolder(tmp_path / "out")
    for name, before in states[0].items():
        expected = before.bits.copy()
        if name in vector:
            kept = vector[name].indices
            expected[kept] = states[1][name].bits[kept]
        assert result.bits(name).tobytes() == expected.tobytes()
    check_result(vector, base)


def test_a_sparsity_that_asks_for_more_than_changed_keeps_every_change(tmp_path: Path) -> None:
    base_bits, tuned_bits = np.zeros(100), np.zeros(100)
    tuned_bits[[3, 50, 51]] = [1, -2, 3]
    _, vector = pack(tmp_path, ({"w": tensor("F32", base_bits)}, {"w": tensor("F32", tuned_bits)}), 0.5)
    assert oracle.entries(vector["w"]) == {3: 1.0, 50: -2.0, 51: 3.0}


def test_where_every_change_is_kept_those_without_a_finite_difference_are_too(tmp_path: Path) -> None:
    tuned = np.ones(10)
    tuned[[2, 5, 7]] = [np.nan, 2, np.inf]
    base, vector = pack(tmp_path, ({"w": tensor("F32", np.ones(10))}, {"w": tensor("F32", tuned)}), 0.5)
    apply(vector, base, tmp_path / "out")
    assert contents(ModelFolder(tmp_path / "out")) == contents(ModelFolder(tmp_path / "tuned"))


def test_a_sparse_vector_leaves_tensors_that_cannot_be_added_as_they_are(tmp_path: Path) -> None:
    base, vector = pack(tmp_path, MIXED, 0.5)
    assert set(vector) == {"a.weight", "scalar", "z.weight"}
    apply(vector, base, tmp_path / "out")
    result = contents(ModelFolder(tmp_path / "out"))
    assert all(result[name] == contents(base)[name] for name in ("flags", "ids"))


def test_a_sparse_vector_names_its_sparsity(tmp_path: Path) -> None:
    _, vector = pack(tmp_path, F32, 0.9)
    assert vector.provenance == {"made_by": "pack", "tuned": "tuned", "sparsity": 0.9}
    assert vector.header.tuned is None


def test_ties_go_to_the_first_positions_over_several_blocks(tmp_path: Path) -> None:
    """Each of three blocks holds changes of one magnitude; the first of all are kept, however the tensor is read."""
    size = (1 << 23) + 8
    before, after = np.zeros(size, np.uint16), np.zeros(size, np.uint16)
    held = [5, 1 << 21, (1 << 22) - 1, 1 << 22, (1 << 22) + 9, (1 << 23) - 1, 1 << 23, size - 1]
    after[held] = 0x3F80  # one
    states = [
        write_checkpoint(tmp_path / str(i), {"w": Tensor(DTYPES["BF16"], (size,), w)})
        for i, w in enumerate((before, after))
    ]
    vector = diff(*states, 1 - 5 / size)
    vector.save(tmp_path / "vector.lota")
    assert TaskVector.open(tmp_path / "vector.lota")["w"].indices.tolist() == held[:5]
    assert vector["w"].indices.tolist() == held[:5]


def test_a_sparse_patch_is_refused(tmp_path: Path) -> None:
    base, tuned = (write_checkpoint(tmp_path / name, s) for name, s in zip(("base", "tuned"), F32, strict=True))
    with pytest.raises(UsageError, match="a patch keeps every change; `sparsity` needs `kind=vector`"):
        diff(base, tuned, 0.5, kind="patch")


def test_unknown_kinds_and_codecs_are_refused(tmp_path: Path) -> None:
    base, tuned = (write_checkpoint(tmp_path / name, s) for name, s in zip(("base", "tuned"), F32, strict=True))
    with pytest.raises(UsageError, match="`kind` is one of vector, patch, found 'zip'"):
        diff(base, tuned, kind="zip")
    with pytest.raises(UsageError, match="`codec` is one of auto, fast, paper64, plain, found 'zip'"):
        diff(base, tuned).save(tmp_path / "vector.lota", codec="zip")
    assert not (tmp_path / "vector.lota").exists()


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, float("nan")])
def test_a_bad_sparsity_is_refused(sparsity: float, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", F32[0])
    with pytest.raises(UsageError, match="sparsity"):
        diff(base, base, sparsity)


def test_a_sparsity_of_no_change_is_refused(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", F32[0])
    with pytest.raises(MaskError):
        diff(base, base, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if n != "b.weight"}, "'b.weight' is in base and not in tuned"),
        (lambda t: {**t, "c.weight": t["a.weight"]}, "'c.weight' is in tuned and not in base"),
        (lambda t: {**t, "a.weight": tensor("F32", WEIGHTS.T)}, r"'a.weight' is F32 \[8, 5\] in base and F32 \[5, 8\]"),
        (lambda t: {**t, "a.weight": tensor("BF16", WEIGHTS)}, r"'a.weight' is F32 \[8, 5\] in base and BF16 \[8, 5\]"),
    ],
    ids=["missing", "more", "shape", "dtype"],
)
def test_a_sparsity_needs_two_states_of_one_model(
    change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    base, tuned = write_checkpoint(tmp_path / "base", F32[0]), write_checkpoint(tmp_path / "tuned", change(F32[1]))
    with pytest.raises(DiffError, match=message):
        diff(base, tuned, 0.5)


@both_kinds
def test_two_models_have_no_difference(kind: str, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", F32[0])
    tuned = write_checkpoint(tmp_path / "tuned", {f"other.{name}": t for name, t in F32[1].items()})
    with pytest.raises(DiffError, match="base and tuned have no tensor in common: not two states of one model"):
        diff(base, tuned, kind=kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if n != "b.weight"}, "no tensor 'b.weight'"),
        (
            lambda t: {**t, "a.weight": tensor("F32", WEIGHTS.T)},
            r"'a.weight' should be F32 \[8, 5\], found F32 \[5, 8\]",
        ),
        (lambda t: {**t, "a.weight": tensor("F16", WEIGHTS)}, r"'a.weight' should be F32 \[8, 5\], found F16 \[8, 5\]"),
        (
            lambda t: {**t, "b.weight": tensor("F32", -WEIGHTS[0])},
            "tensor 'b.weight' has other values where the vector changes it",
        ),
    ],
    ids=["missing", "shape", "dtype", "values"],
)
@both_kinds
def test_another_base_is_refused_and_nothing_is_left(
    kind: str, change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    _, vector = pack(tmp_path, F32, kind=kind)
    other = write_checkpoint(tmp_path / "other", change(F32[0]))
    before = sorted(tmp_path.iterdir())
    for refuse in (check_result, lambda v, b: apply(v, b, tmp_path / "out")):
        with pytest.raises(BaseMismatchError, match=f"^other is not the base of vector.lota \\(base\\): .*{message}"):
            refuse(vector, other)
    assert sorted(tmp_path.iterdir()) == before


@both_kinds
@pytest.mark.parametrize("dtype", SAME_DTYPE)
def test_a_base_of_the_same_form_but_other_weights_is_refused(kind: str, dtype: str, tmp_path: Path) -> None:
    """However far the weights are: what is stored relative to the base must not be taken for a damaged file."""
    states = SAME_DTYPE[dtype]
    _, vector = pack(tmp_path, states, kind=kind)
    for number, scale in enumerate((-1.0, 0.0, 1e-3, 1e3)):
        others = {
            name: tensor(dtype, np.sin(np.arange(1, t.bits.size + 1)).reshape(t.shape) * scale)
            for name, t in states[0].items()
        }
        other = write_checkpoint(tmp_path / f"other{number}", others)
        for refuse in (check_result, lambda v, b: apply(v, b, tmp_path / "out")):
            with pytest.raises(
                BaseMismatchError, match=r"tensor 'a.weight' has other values where the vector changes it"
            ):
                refuse(vector, other)
    assert not (tmp_path / "out").exists()


@every_state
@both_kinds
def test_the_result_is_no_base(states: States, kind: str, tmp_path: Path) -> None:
    base, vector = pack(tmp_path, states, kind=kind)
    apply(vector, base, tmp_path / "out")
    before = sorted(tmp_path.iterdir())
    first = f"({'|'.join(vector)})"  # shards come in their own order
    for refuse in (check_result, lambda v, b: apply(v, b, tmp_path / "twice")):
        with pytest.raises(AlreadyAppliedError, match=f"vector.lota is applied to out already: tensor '{first}'"):
            refuse(vector, ModelFolder(tmp_path / "out"))
    assert sorted(tmp_path.iterdir()) == before


Edit = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
WEIGHTS_DIFFER = "weights that the vector does not change differ from its base"


@both_kinds
@pytest.mark.parametrize(
    "edit",
    [
        lambda t: {**t, "frozen": tensor("F32", WEIGHTS + 1)},
        lambda t: {**t, "more": tensor("F32", [1])},
        lambda t: {n: x for n, x in t.items() if n != "frozen"},
        lambda t: {**t, "frozen": tensor("BF16", WEIGHTS)},
    ],
    ids=["values", "one more", "one less", "dtype"],
)
def test_a_base_that_differs_elsewhere_gives_another_result(kind: str, edit: Edit, tmp_path: Path) -> None:
    _, vector = pack(tmp_path, F32, kind=kind)
    other = write_checkpoint(tmp_path / "other", edit(F32[0]))
    check_result(vector, other)
    assert apply(vector, other, tmp_path / "out") == Applied(False, (WEIGHTS_DIFFER,))
    changed = {name: F32[1][name] for name in vector}
    expected = write_checkpoint(tmp_path / "expected", {**edit(F32[0]), **changed})
    assert contents(ModelFolder(tmp_path / "out")) == contents(expected)


def test_weights_that_differ_within_a_touched_tensor_are_kept(tmp_path: Path) -> None:
    before = np.arange(1, 9, dtype=np.float32)
    after, other = before.copy(), before.copy()
    after[[1, 5]] *= 2
    other[[0, 7]] = -1
    _, vector = pack(tmp_path, ({"w": tensor("F32", before)}, {"w": tensor("F32", after)}))
    applied = apply(vector, write_checkpoint(tmp_path / "other", {"w": tensor("F32", other)}), tmp_path / "out")
    assert applied == Applied(False, (WEIGHTS_DIFFER,))
    assert ModelFolder(tmp_path / "out").bits("w").view(np.float32).tolist() == [-1, 4, 3, 4, 5, 12, 7, -1]


@both_kinds
def test_other_shards_of_the_base_are_named(kind: str, tmp_path: Path) -> None:
    _, vector = pack(tmp_path, F32, kind=kind)
    other = write_checkpoint(tmp_path / "other", F32[0], 2)
    applied = apply(vector, other, tmp_path / "out")
    assert applied == Applied(False, ("the shards are those of other, not those of the vector's base",))
    assert contents(ModelFolder(tmp_path / "out")) == contents(ModelFolder(tmp_path / "tuned"))


@both_kinds
def test_side_files_that_the_base_should_have_are_named(kind: str, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "vocab.txt": b"a", "merges.txt": b"b"}
    base = write_checkpoint(tmp_path / "base", F32[0], files=files)
    tuned = write_checkpoint(tmp_path / "tuned", F32[1], files={**files, "config.json": b'{"a": 1}'})
    diff(base, tuned, kind=kind).save(tmp_path / "vector.lota")
    vector = TaskVector.open(tmp_path / "vector.lota")
    other = write_checkpoint(tmp_path / "other", F32[0], files={"config.json": b"x", "vocab.txt": b"c", "own": b"d"})
    applied = apply(vector, other, tmp_path / "out")
    assert applied == Applied(False, ("merges.txt is not in the base", "vocab.txt differs from the vector's base"))
    side_files = {path.name: path.read_bytes() for path in ModelFolder(tmp_path / "out").side_files}
    assert side_files == {"config.json": b'{"a": 1}', "vocab.txt": b"c"}
    # a lone file has none of them
    lone = apply(vector, ModelFolder(tmp_path / "base" / "model.safetensors"), tmp_path / "lone")
    assert lone == Applied(False, ("merges.txt is not in the base", "vocab.txt is not in the base"))


def test_side_files_of_the_base_are_copied_where_the_vector_knows_none(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "tokenizer.json": '{"a": "é"}'.encode(), "merges.txt": b"#version"}
    base = write_checkpoint(tmp_path / "base", F32[0], 2, files)
    (tmp_path / "base" / "pytorch_model.bin").touch()
    tuned = write_checkpoint(tmp_path / "tuned", F32[1], 1, {"other.txt": b"1"})
    assert apply(diff(base, tuned, 0.5), ModelFolder(tmp_path / "base"), tmp_path / "out") == Applied(
        None, (), ("pytorch_model.bin",)
    )
    result = {path.name: path.read_bytes() for path in ModelFolder(tmp_path / "out").side_files}
    index = (tmp_path / "base" / "model.safetensors.index.json").read_bytes()
    assert result == {**files, "model.safetensors.index.json": index}
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


@both_kinds
def test_a_result_with_another_digest_is_refused_and_nothing_is_left(kind: str, tmp_path: Path) -> None:
    base, vector = pack(tmp_path, F32, kind=kind)
    specs = dict(vector.specs)
    (block,) = specs["b.weight"].blocks
    specs["b.weight"] = replace(specs["b.weight"], blocks=(replace(block, after="0" * 16),))
    doubtful = TaskVector(vector.header, specs.values(), Stored(LotaReader(tmp_path / "vector.lota")), "doubtful")
    before = sorted(tmp_path.iterdir())
    for refuse in (check_result, lambda v, b: apply(v, b, tmp_path / "out")):
        with pytest.raises(ChecksumError, match=r"'b\.weight': the result does not have the digest in doubtful"):
            refuse(doubtful, base)
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_vector_leaves_an_earlier_output_as_it_was(tmp_path: Path) -> None:
    base, vector = pack(tmp_path, F32)
    apply(vector, base, tmp_path / "out")
    data = bytearray((tmp_path / "vector.lota").read_bytes())
    data[-1] ^= 1
    (tmp_path / "vector.lota").write_bytes(data)
    expected = contents(ModelFolder(tmp_path / "out"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ChecksumError):
        apply(TaskVector.open(tmp_path / "vector.lota"), base, tmp_path / "out", force=True)
    assert contents(ModelFolder(tmp_path / "out")) == expected
    assert sorted(tmp_path.iterdir()) == before


def test_a_tensor_that_the_vector_lacks_is_a_key_error(tmp_path: Path) -> None:
    _, vector = pack(tmp_path, F32)
    with pytest.raises(KeyError):
        vector["frozen"]
    assert "frozen" not in vector


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_delta_that_is_no_number_is_not_stored(value: float, tmp_path: Path) -> None:
    delta = SparseTensor((4,), np.array([1, 3]), np.array([1, value], np.float32))
    spec = TensorSpec.like("w", Form(DTYPES["F32"], (4,)))
    header = Header("vector", Identity("base", "ba5e" * 16), None, ())
    vector = TaskVector(header, [spec], Memory({"w": delta}, {"w": spec}), "mine")
    with pytest.raises(StreamError, match=f"mine: tensor 'w': delta: {value} at position 3 is not a finite number"):
        vector.save(tmp_path / "x.lota")
    assert not list(tmp_path.iterdir())
