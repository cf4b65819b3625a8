"""tuned − base, saved, opened and applied to the base, is tuned; to anything else it is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from building import Tensor, contents, tensor, write_checkpoint

from taskvec import Checkpoint, TaskVector, apply, check_base, check_result, diff
from taskvec.errors import BaseMismatchError, DiffError, MaskError, UsageError
from taskvec_formats import LotaReader
from taskvec_formats.errors import ChecksumError

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


def pack(folder: Path, states: States, sparsity: float | None = None) -> tuple[Checkpoint, TaskVector]:
    """The base, and the vector as it is after a round trip through a file."""
    base, tuned = (write_checkpoint(folder / name, s) for name, s in zip(("base", "tuned"), states, strict=True))
    diff(base, tuned, sparsity).save(folder / "vector.lota")
    return base, TaskVector.open(folder / "vector.lota")


@every_state
@pytest.mark.parametrize("shards", [(1, 1), (3, 2)], ids=["one shard", "other shards"])
def test_the_tuned_checkpoint_comes_back_to_the_bit(states: States, shards: tuple[int, int], tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", states[0], shards[0])
    tuned = write_checkpoint(tmp_path / "tuned", states[1], shards[1])
    diff(base, tuned).save(tmp_path / "vector.lota")
    vector = TaskVector.open(tmp_path / "vector.lota")
    check_base(vector, base)
    check_result(vector, base)
    apply(vector, base, tmp_path / "out")
    result = Checkpoint(tmp_path / "out")
    assert contents(result) == contents(tuned)
    assert result.fingerprint == tuned.fingerprint
    assert [shard.path.name for shard in result.shards] == [shard.path.name for shard in base.shards]
    assert [shard.header for shard in result.shards] == [shard.header for shard in base.shards]


@every_state
def test_the_entries_are_those_of_the_definition(states: States, tmp_path: Path) -> None:
    base, vector = pack(tmp_path, states)
    changed = [name for name in base.tensors if states[0][name].bits.tobytes() != states[1][name].bits.tobytes()]
    assert list(vector) == changed
    for name in changed:
        before, after = states[0][name], states[1][name]
        found = oracle.entries(vector[name]), oracle.entries(vector.exceptions(name))
        assert found == oracle.difference(before.dtype, before.bits, after.bits)


def test_the_vector_knows_both_ends(tmp_path: Path) -> None:
    base, vector = pack(tmp_path, F32)
    tuned = Checkpoint(tmp_path / "tuned")
    assert (vector.base.name, vector.base.fingerprint) == ("base", base.fingerprint)
    assert (vector.name, vector.provenance) == ("vector.lota", {"made_by": "pack", "tuned": "tuned"})
    for name, spec in vector.specs.items():
        assert (spec.base, spec.tuned, spec.eligible) == (base.digest(name), tuned.digest(name), True)


def test_an_unsaved_vector_applies_as_well(tmp_path: Path) -> None:
    base, tuned = (write_checkpoint(tmp_path / name, s) for name, s in zip(("base", "tuned"), MIXED, strict=True))
    apply(diff(base, tuned), base, tmp_path / "out")
    assert contents(Checkpoint(tmp_path / "out")) == contents(tuned)


def test_equal_checkpoints_have_an_empty_vector(tmp_path: Path) -> None:
    base, vector = pack(tmp_path, (MIXED[0], MIXED[0]))
    assert len(vector) == 0
    apply(vector, base, tmp_path / "out")
    assert contents(Checkpoint(tmp_path / "out")) == contents(base)


def test_a_single_file_can_be_the_base(tmp_path: Path) -> None:
    for name, tensors in zip(("base", "tuned"), MIXED, strict=True):
        write_checkpoint(tmp_path / name, tensors)
    base, tuned = (Checkpoint(tmp_path / name / "model.safetensors") for name in ("base", "tuned"))
    apply(diff(base, tuned), base, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert contents(Checkpoint(tmp_path / "out")) == contents(tuned)


def test_side_files_of_the_base_are_copied(tmp_path: Path) -> None:
    states = {name: write_checkpoint(tmp_path / name, s, 2) for name, s in zip(("base", "tuned"), F32, strict=True)}
    side_files = {"config.json": "{}", "tokenizer.json": '{"a": "é"}', "merges.txt": "#version"}
    for name, text in side_files.items():
        (tmp_path / "base" / name).write_text(text)
    (tmp_path / "base" / "pytorch_model.bin").touch()
    vector = diff(states["base"], states["tuned"])
    apply(vector, Checkpoint(tmp_path / "base"), tmp_path / "out")
    result = {path.name: path.read_text() for path in Checkpoint(tmp_path / "out").side_files}
    index = (tmp_path / "base" / "model.safetensors.index.json").read_text()
    assert result == {**side_files, "model.safetensors.index.json": index}
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


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

    apply(vector, base, tmp_path / "out")
    result = Checkpoint(tmp_path / "out")
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
    assert contents(Checkpoint(tmp_path / "out")) == contents(Checkpoint(tmp_path / "tuned"))


def test_a_sparse_vector_leaves_tensors_that_cannot_be_added_as_they_are(tmp_path: Path) -> None:
    base, vector = pack(tmp_path, MIXED, 0.5)
    assert set(vector) == {"a.weight", "scalar", "z.weight"}
    apply(vector, base, tmp_path / "out")
    result = contents(Checkpoint(tmp_path / "out"))
    assert all(result[name] == contents(base)[name] for name in ("flags", "ids"))


def test_a_sparse_vector_names_its_sparsity(tmp_path: Path) -> None:
    _, vector = pack(tmp_path, F32, 0.9)
    assert vector.provenance == {"made_by": "pack", "tuned": "tuned", "sparsity": 0.9}


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
        (lambda t: {n: x for n, x in t.items() if n != "b.weight"}, "'b.weight' is in base but not in tuned"),
        (lambda t: {**t, "c.weight": t["a.weight"]}, "'c.weight' is in tuned but not in base"),
        (lambda t: {**t, "a.weight": tensor("F32", WEIGHTS.T)}, r"'a.weight' is F32 \[8, 5\] in base but F32 \[5, 8\]"),
        (lambda t: {**t, "a.weight": tensor("BF16", WEIGHTS)}, r"'a.weight' is F32 \[8, 5\] in base but BF16 \[8, 5\]"),
    ],
    ids=["missing", "more", "shape", "dtype"],
)
def test_two_models_have_no_difference(
    change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    base, tuned = write_checkpoint(tmp_path / "base", F32[0]), write_checkpoint(tmp_path / "tuned", change(F32[1]))
    with pytest.raises(DiffError, match=message):
        diff(base, tuned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if n != "b.weight"}, "no tensor 'b.weight'"),
        (
            lambda t: {**t, "a.weight": tensor("F32", WEIGHTS.T)},
            r"'a.weight' should be F32 \[8, 5\], found F32 \[5, 8\]",
        ),
        (lambda t: {**t, "a.weight": tensor("F16", WEIGHTS)}, r"'a.weight' should be F32 \[8, 5\], found F16 \[8, 5\]"),
        (lambda t: {**t, "b.weight": tensor("F32", -WEIGHTS[0])}, "tensor 'b.weight' has other values"),
        (lambda t: {**t, "frozen": tensor("F32", WEIGHTS + 1)}, "a tensor outside the vector differs"),
        (lambda t: {**t, "more": tensor("F32", [1])}, "a tensor outside the vector differs"),
    ],
    ids=["missing", "shape", "dtype", "values", "values outside", "one more"],
)
def test_another_base_is_refused_before_anything_is_written(
    change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    _, vector = pack(tmp_path, F32)
    other = write_checkpoint(tmp_path / "other", change(F32[0]))
    before = sorted(tmp_path.iterdir())
    for refuse in (check_base, check_result, lambda v, b: apply(v, b, tmp_path / "out")):
        with pytest.raises(BaseMismatchError, match=f"other is not the base of this vector \\(base\\): .*{message}"):
            refuse(vector, other)
    assert sorted(tmp_path.iterdir()) == before


def test_a_result_with_another_digest_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    base, vector = pack(tmp_path, F32)
    specs = [replace(spec, tuned="0" * 64) if spec.name == "b.weight" else spec for spec in vector.specs.values()]
    doubtful = TaskVector(vector.base, specs, LotaReader(tmp_path / "vector.lota"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ChecksumError, match=r"'b\.weight'"):
        apply(doubtful, base, tmp_path / "out")
    with pytest.raises(ChecksumError, match=r"'b\.weight'"):
        check_result(doubtful, base)
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_vector_leaves_an_earlier_output_as_it_was(tmp_path: Path) -> None:
    base, vector = pack(tmp_path, F32)
    apply(vector, base, tmp_path / "out")
    data = bytearray((tmp_path / "vector.lota").read_bytes())
    data[-1] ^= 1
    (tmp_path / "vector.lota").write_bytes(data)
    expected = contents(Checkpoint(tmp_path / "out"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ChecksumError):
        apply(TaskVector.open(tmp_path / "vector.lota"), base, tmp_path / "out")
    assert contents(Checkpoint(tmp_path / "out")) == expected
    assert sorted(tmp_path.iterdir()) == before


def test_a_tensor_that_the_vector_lacks_is_a_key_error(tmp_path: Path) -> None:
    _, vector = pack(tmp_path, F32)
    with pytest.raises(KeyError):
        vector["frozen"]
    assert "frozen" not in vector
