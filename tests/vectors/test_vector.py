"""What a task vector says of itself, and what it becomes: summaries, torch tensors, smaller vectors, pickles."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import oracle
from support.building import sparse, tensor, vector_of, write_checkpoint
from support.commands import ok, refused

from taskvec import TaskVector, diff, merge
from taskvec.errors import DiffError, KindError, MergeError, UsageError


def stored(vector: TaskVector, path: Path) -> TaskVector:
    vector.save(path)
    return TaskVector.open(path)


@pytest.fixture
def vector(tmp_path: Path) -> TaskVector:
    tensors = {"a.weight": sparse((2, 3), {0: 1, 4: -3, 5: 2}), "b.weight": sparse((4,), {1: -2})}
    return stored(vector_of(tensors), tmp_path / "x.lota")


def test_its_repr_says_what_it_holds(vector: TaskVector) -> None:
    assert repr(vector) == "<TaskVector 'x.lota': vector, 2 tensors of 'base', 4 entries, density 40.00%>"
    assert repr(2 * vector) == "<TaskVector '2 * x.lota': vector, 2 tensors of 'base', computed when it is read>"


def test_its_table_is_safe_for_a_page(tmp_path: Path) -> None:
    vector = stored(vector_of({"w": sparse((2,), {0: 1})}), tmp_path / "<script>.lota")
    for shown in (vector._repr_html_(), (vector + vector)._repr_html_()):
        assert "<script>" not in shown
        assert "<tr><th>eligible weights</th><td>2</td></tr>" in shown


def test_its_summary_is_plain(vector: TaskVector) -> None:
    summary = vector.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["entries"], summary["eligible"], summary["density"]) == (4, 10, 0.4)
    assert [tensor["entries"] for tensor in summary["tensors"]] == [3, 1]
    computed = (vector - vector).summary()
    assert (computed["entries"], computed["density"], computed["eligible"]) == (None, None, 10)


@pytest.mark.parametrize("shape", [(2, 3), (6,), (), (1, 2, 3), (0, 3)])
def test_its_tensors_become_those_of_torch(shape: tuple[int, ...], tmp_path: Path) -> None:
    size = int(np.prod(shape))
    entries = {place: place + 0.5 for place in range(0, size, 2)}
    vector = stored(vector_of({"w": sparse(shape, entries)}), tmp_path / "x.lota")
    expected = torch.zeros(size)
    for place, value in entries.items():
        expected[place] = value
    dense = vector.to_torch("w", dense=True)
    assert torch.equal(dense, expected.reshape(shape))
    found = vector.to_torch("w")
    assert found.is_sparse
    assert found.is_coalesced()
    assert torch.equal(found.to_dense(), dense)
    with pytest.raises(KeyError):
        vector.to_torch("v")


def test_a_vector_of_a_file_is_pickled_as_its_path(vector: TaskVector) -> None:
    again = pickle.loads(pickle.dumps(vector))
    assert again == vector
    assert copy.deepcopy(vector) == vector
    with pytest.raises(
        UsageError, match="is computed when it is read and cannot be pickled: save it and open the file"
    ):
        pickle.dumps(2 * vector)


def test_a_pickled_vector_is_the_same_one_or_an_error(
    vector: TaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    stored(vector_of({"a.weight": sparse((2,), {0: 1})}), other / "x.lota")
    monkeypatch.chdir(tmp_path)
    opened = TaskVector.open("x.lota")
    monkeypatch.chdir(other)
    assert copy.deepcopy(opened) == vector
    data = pickle.dumps(opened)
    (other / "x.lota").replace(tmp_path / "x.lota")
    with pytest.raises(UsageError, match=r"x\.lota: the file was replaced after this vector was pickled or copied"):
        pickle.loads(data)


def test_a_digest_depends_on_entries_that_are_not_stored(tmp_path: Path) -> None:
    """Two fine-tunes in folders of one name, and two vectors in memory."""
    for name, value in (("base", 0.0), ("a/model", 1.0), ("b/model", 2.0)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_checkpoint(tmp_path / name, {"w": tensor("F32", np.full(3, value))}, 1, {})
    for sparsity in (None, 0.3):
        one, other = (diff(tmp_path / "base", tmp_path / name / "model", sparsity) for name in "ab")
        assert one.name == other.name
        assert one.digest != other.digest
        assert one.digest == diff(tmp_path / "base", tmp_path / "a/model", sparsity).digest
        assert (2 * one).digest != (2 * other).digest
        assert merge([one, one]).digest != merge([one, other]).digest
    one, other = (vector_of({"w": sparse((3,), {0: value})}) for value in (1.0, 2.0))
    assert one.digest != other.digest


@pytest.mark.parametrize("shards", [1, 2])
def test_a_difference_whose_folder_is_gone_cannot_be_saved(shards: int, tmp_path: Path) -> None:
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        tensors = {key: tensor("F32", np.full(3, value)) for key in "vw"}
        write_checkpoint(tmp_path / name, tensors, shards, {"config.json": name.encode()})
    vector = diff(tmp_path / "base", tmp_path / "tuned")
    shutil.rmtree(tmp_path / "tuned")
    with pytest.raises(DiffError, match=r"config\.json: No such file or directory; the folder must not change before"):
        vector.save(tmp_path / "x.lota")
    assert not (tmp_path / "x.lota").exists()


@given(data=st.data(), sparsity=st.sampled_from([0.1, 0.5, 0.9, 0.99]))
def test_shrinking_keeps_the_largest_entries(data: st.DataObject, sparsity: float) -> None:
    shapes = {"a": (7,), "b": (3, 5), "c": (0,)}
    values = {
        name: data.draw(
            st.dictionaries(
                st.integers(0, int(np.prod(shape)) - 1), st.sampled_from([-2.0, -1.0, 0.5, 1.0, 3.0]), max_size=12
            )
            if np.prod(shape)
            else st.just({})
        )
        for name, shape in shapes.items()
    }
    vector = vector_of({name: sparse(shape, dict(sorted(values[name].items()))) for name, shape in shapes.items()})
    assume(round((1 - sparsity) * vector.eligible))
    ranked = sorted(
        ((-abs(value), name, place) for name, entries in values.items() for place, value in entries.items())
    )
    kept = {(name, place) for _, name, place in ranked[: round((1 - sparsity) * vector.eligible)]}
    smaller = vector.shrink(sparsity)
    for name in shapes:
        expected = {place: value for place, value in values[name].items() if (name, place) in kept}
        assert oracle.entries(smaller[name]) == expected


def test_a_shrunk_vector_is_that_of_trimming(vector: TaskVector, tmp_path: Path) -> None:
    smaller = stored(vector.shrink(0.8), tmp_path / "smaller.lota")
    trimmed = stored(merge([vector], "ties", density=0.2), tmp_path / "trimmed.lota")
    assert smaller == trimmed
    assert smaller.provenance["made_by"] == "shrink"
    assert smaller.provenance["parents"] == [{"name": "x.lota", "digest": vector.digest}]
    ok("shrink", tmp_path / "x.lota", "--sparsity", "0.8", "-o", tmp_path / "command.lota")
    assert (tmp_path / "command.lota").read_bytes() == (tmp_path / "smaller.lota").read_bytes()


def test_entries_of_value_zero_do_not_count_when_a_vector_is_shrunk(tmp_path: Path) -> None:
    """A mask without values has entries of value zero."""
    stored(vector_of({"w": sparse((10,), {0: 0.0, 3: 2.0, 5: 0.0, 7: -1.0})}), tmp_path / "x.lota")
    file = tmp_path / "y.lota"
    said = refused(2, "shrink", tmp_path / "x.lota", "--sparsity", "0.7", "-o", file)
    assert said == "taskvec: x.lota: 3 entries are wanted but only 2 weights changed\n"
    assert not file.exists()
    ok("shrink", tmp_path / "x.lota", "--sparsity", "0.8", "-o", file)
    assert list(TaskVector.open(file)["w"].indices) == [3, 7]


def test_what_cannot_be_shrunk_is_refused(vector: TaskVector, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has 4 entries of 10 eligible weights; a sparsity of 0\.1 would keep 9"):
        vector.shrink(0.1)
    with pytest.raises(UsageError, match="`sparsity` must be between 0 and 1"):
        vector.shrink(1)
    base = write_checkpoint(tmp_path / "base", {"w": tensor("F32", [1, 2])})
    tuned = write_checkpoint(tmp_path / "tuned", {"w": tensor("F32", [1, 3])})
    with pytest.raises(KindError):
        diff(base, tuned, kind="patch").shrink(0.5)
    wider = write_checkpoint(tmp_path / "wider", {"w": tensor("F32", [1, 3, 4])})
    with pytest.raises(MergeError, match="cannot be ranked"):
        diff(base, wider).shrink(0.5)
    said = refused(2, "shrink", tmp_path / "x.lota", "--sparsity", "0.1", "-o", tmp_path / "y.lota")
    assert "would keep 9" in said
    assert not (tmp_path / "y.lota").exists()
