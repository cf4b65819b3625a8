"""Coordinates in safetensors files: written as documented, and read if they are unambiguous."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import save_file
from support.commands import ok, refused
from support.paths import ROOT

import taskvec
from taskvec import TaskVector, interop
from taskvec.errors import BaseMismatchError, ConversionError, KindError, UsageError
from taskvec_formats import FormatError, ModelFolder

BASE = {
    "b": torch.linspace(-1, 1, 12).view(3, 4),
    "empty": torch.zeros(0, 4),
    "half": torch.linspace(-1, 1, 6).bfloat16(),
    "ids": torch.arange(4),
    "scalar": torch.tensor(2.0),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file(BASE, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def vector(base: Path, tmp_path: Path) -> TaskVector:
    tuned = {name: values.clone() for name, values in BASE.items()}
    tuned["b"][1] += 0.5
    tuned["b"][0, 0] = torch.nan
    tuned["half"][2:] *= 3
    tuned["scalar"] += 1
    tuned["ids"][0] = 7
    save_file(tuned, tmp_path / "tuned.safetensors")
    return taskvec.pack(base, tmp_path / "tuned.safetensors", tmp_path / "v.lota")


def same(one: TaskVector, other: TaskVector) -> bool:
    return list(one) == list(other) and all(
        np.array_equal(one[name].indices, other[name].indices) and np.array_equal(one[name].values, other[name].values)
        for name in one
    )


def test_the_round_trip_keeps_the_entries(base: Path, vector: TaskVector, tmp_path: Path) -> None:
    written = interop.to_coo(tmp_path / "v.lota", tmp_path / "coo.safetensors")
    back = interop.from_coo(written.path, base)
    back.save(tmp_path / "back.lota")
    assert written.dropped == 2  # NaN, and the integer
    assert written.entries == sum(len(vector[name]) for name in vector)
    assert list(back) == ["b", "half", "scalar"]
    assert all(np.array_equal(back[name].indices, vector[name].indices) for name in back)
    assert same(TaskVector.open(tmp_path / "back.lota"), back)
    tensors = load_file(written.path)
    assert {name: values.dtype for name, values in tensors.items() if name.startswith("b.")} == {
        "b.indices": np.int32,
        "b.values": np.float32,
        "b.shape": np.int64,
    }
    # the same file from a vector that was never stored
    again = interop.to_coo(taskvec.diff(base, tmp_path / "tuned.safetensors"), tmp_path / "again.safetensors")
    assert again.path.read_bytes() == written.path.read_bytes()
    assert len(interop.from_coo(written.path, base, 0.5)["b"]) <= 9


@given(
    st.integers(0, 2**32 - 1), st.sampled_from([torch.int32, torch.int64]), st.booleans(), st.booleans(), st.booleans()
)
def test_layouts_of_other_programs(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: torch.dtype, by_axis: bool, shuffled: bool, shape: bool
) -> None:
    folder = tmp_path_factory.mktemp("coo")
    save_file(BASE, folder / "base.safetensors")
    dice = np.random.default_rng(seed)
    at = np.sort(dice.choice(12, dice.integers(0, 13), replace=False))
    values = dice.standard_normal(len(at)).astype(np.float32)
    order = dice.permutation(len(at)) if shuffled else np.arange(len(at))
    positions = np.stack(np.unravel_index(at[order], (3, 4))) if by_axis else at[order]
    tensors = {"b.indices": torch.from_numpy(positions).to(dtype), "b.values": torch.from_numpy(values[order])}
    if shape:
        tensors["b.shape"] = torch.tensor([3, 4])
    save_file(tensors, folder / "other.safetensors")
    found = interop.from_coo(folder / "other.safetensors", folder / "base.safetensors", are_deltas=True)["b"]
    assert np.array_equal(found.indices, at)
    assert np.array_equal(found.values, values)


def test_a_scalar_has_no_coordinates(base: Path, tmp_path: Path) -> None:
    tensors = {"scalar.indices": torch.zeros(0, 1).long(), "scalar.values": torch.ones(1)}
    save_file(tensors, tmp_path / "other.safetensors")
    found = interop.from_coo(tmp_path / "other.safetensors", base, are_deltas=True)["scalar"]
    assert (found.indices.tolist(), found.values.tolist()) == ([0], [1.0])


def test_values_of_other_dtypes_are_converted(base: Path, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        tensors = {"b.indices": torch.tensor([3]), "b.values": torch.tensor([0.5], dtype=dtype)}
        save_file(tensors, tmp_path / "other.safetensors")
        found = interop.from_coo(tmp_path / "other.safetensors", base, are_deltas=True)["b"]
        assert (found.indices.tolist(), found.values.tolist()) == ([3], [0.5])


GOOD = {"b.indices": torch.tensor([1, 5]), "b.values": torch.tensor([1.0, 2.0])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b.extra": torch.ones(1)}, r"has tensor 'b\.extra', which is not NAME\.indices"),
        ({"b.indices": None}, r"has 'b\.values' without 'b\.indices'"),
        ({"b.values": None}, r"has tensor 'b\.indices', which is not"),
        ({"b.indices": torch.tensor([1.0, 5.0])}, r"has indices F32 \[2\] and values F32 \[2\]; expected I32 or I64"),
        ({"b.values": torch.ones(2, 1)}, r"expected I32 or I64, and floating-point numbers \[n\]"),
        ({"b.values": torch.ones(3)}, r"has 3 values but indices \[2\]; expected \[3\] or \[2, 3\]"),
        ({"b.indices": torch.ones(4, 2, dtype=torch.int32)}, r"has 2 values but indices \[4, 2\]"),
        ({"b.indices": torch.tensor([1, 12])}, r"has positions outside its shape \[3, 4\]"),
        ({"b.indices": torch.tensor([-1, 3])}, r"has positions outside its shape \[3, 4\]"),
        ({"b.indices": torch.tensor([[0, 3], [0, 0]])}, r"has positions outside its shape \[3, 4\]"),
        ({"b.indices": torch.tensor([5, 5])}, r"has a position twice"),
        ({"b.values": torch.tensor([1.0, torch.inf])}, r"has a value that is not a finite number"),
        ({"b.values": torch.tensor([1.0, 1e300]).double()}, "has a value that is not a finite number"),
        ({"b.shape": torch.tensor([4, 3])}, r"is \[4, 3\], but \[3, 4\] in base"),
        ({"b.shape": torch.ones(2)}, r"has the shape F32 \[2\]; expected I32 or I64"),
        (
            {"c.indices": torch.tensor([0]), "c.values": torch.ones(1)},
            r"changes tensor 'c', which base.* does not have",
        ),
        ({"ids.indices": torch.tensor([0]), "ids.values": torch.ones(1)}, r"tensor 'ids' is I64 \[4\] in base"),
        ({"b.indices": None, "b.values": None, "b": torch.ones(3, 4)}, r"has tensor 'b', which is not"),
        ({"b.indices": None, "b.values": None}, r"changes nothing"),
    ],
)
def test_other_files_are_refused(base: Path, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = {name: values for name, values in (GOOD | change).items() if values is not None}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ConversionError, match=message):
        interop.from_coo(tmp_path / "other.safetensors", base, are_deltas=True)["b"]


def test_values_that_may_be_weights_are_refused(base: Path, vector: TaskVector, tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "other.safetensors")
    with pytest.raises(ConversionError, match="does not say whether its values are deltas or new weights"):
        interop.from_coo(tmp_path / "other.safetensors", base)
    interop.to_coo(vector, tmp_path / "coo.safetensors")
    save_file({**BASE, "b": BASE["b"] + 1}, tmp_path / "else.safetensors")
    with pytest.raises(BaseMismatchError, match=r"was taken from base.*, not from else"):
        interop.from_coo(tmp_path / "coo.safetensors", tmp_path / "else.safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"short")
    with pytest.raises(FormatError):
        interop.from_coo(tmp_path / "short.safetensors", base)


def test_the_program_of_the_documentation_adds_a_vector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: values for name, values in BASE.items() if name != "ids"}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    tuned = {"b": tensors["b"] * 2, "half": tensors["half"] * 3, "scalar": tensors["scalar"] + 1}
    save_file(tensors | tuned, tmp_path / "tuned.safetensors")
    vector = taskvec.diff(tmp_path / "base", tmp_path / "tuned.safetensors")
    interop.to_coo(vector, tmp_path / "sql.safetensors")
    page = (ROOT / "docs" / "conversions.md").read_text(encoding="utf-8")
    program = next(block for block in page.split("```python\n")[1:] if "with-sql" in block).partition("```")[0]
    assert program.count("\n") <= 12
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "conversions.md", "exec"), {})
    found, expected = ModelFolder(tmp_path / "with-sql.safetensors"), ModelFolder(tmp_path / "tuned.safetensors")
    assert found.digests() == expected.digests()


def test_vectors_without_deltas_are_refused(base: Path, vector: TaskVector, tmp_path: Path) -> None:
    with pytest.raises(KindError, match="is a patch, which has no deltas"):
        interop.to_coo(taskvec.diff(base, tmp_path / "tuned.safetensors", kind="patch"), tmp_path / "coo.safetensors")
    save_file({**BASE, "more": torch.ones(2)}, tmp_path / "more.safetensors")
    with pytest.raises(ConversionError, match="adds tensor 'more' or changes its form"):
        interop.to_coo(taskvec.diff(base, tmp_path / "more.safetensors"), tmp_path / "coo.safetensors")
    save_file({"b": BASE["b"] + 1}, tmp_path / "less.safetensors")
    with pytest.raises(ConversionError, match="removes tensor 'empty'"):
        interop.to_coo(taskvec.diff(base, tmp_path / "less.safetensors"), tmp_path / "coo.safetensors")
    assert not (tmp_path / "coo.safetensors").exists()
    with pytest.raises(UsageError, match=r"a file whose name ends in \.safetensors"):
        interop.to_coo(vector, tmp_path / "coo.lota")


def test_the_command(base: Path, vector: TaskVector, tmp_path: Path) -> None:
    coo = tmp_path / "coo.safetensors"
    report = json.loads(ok("convert", tmp_path / "v.lota", "--to", "coo", "-o", coo, "--json"))
    assert report == {"path": str(coo), "format": "coo", "tensors": 3, "entries": 9, "dropped": 2}
    ok("convert", coo, "--base", base, "-o", tmp_path / "back.lota")
    assert same(TaskVector.open(tmp_path / "back.lota"), interop.from_coo(coo, base))
    assert "a task vector needs --base" in refused(2, "convert", coo, "-o", tmp_path / "again.lota")
    save_file(GOOD, tmp_path / "other.safetensors")
    command = ["convert", tmp_path / "other.safetensors", "--base", base, "-o", tmp_path / "other.lota"]
    assert "--from must be coo or delta" in refused(2, *command)
    ok(*command, "--from", "coo")
