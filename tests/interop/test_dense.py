"""Dense checkpoints of deltas: tuned − base in f32, and base + delta rounded once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import ok, refused
from support.models import make_llama, perturb

import taskvec
from taskvec import TaskVector, interop
from taskvec.errors import BaseMismatchError, ConversionError, KindError, OutputExistsError, UsageError
from taskvec_formats import ModelFolder


def same(one: TaskVector, other: TaskVector) -> bool:
    return list(one) == list(other) and all(
        np.array_equal(one[name].indices, other[name].indices) and np.array_equal(one[name].values, other[name].values)
        for name in one
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_size", [None, "20KB"], ids=["one", "shards"])
def test_the_round_trip_keeps_the_entries(dtype: str, shard_size: str | None, tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", dtype=dtype, shard_size=shard_size)
    tuned = perturb(base, tmp_path / "tuned", dtype=dtype)
    vector = taskvec.pack(base, tuned, tmp_path / "v.lota")
    folder = interop.to_delta(vector, base, tmp_path / "delta")
    file = interop.to_delta(vector, base, tmp_path / "delta.safetensors")
    assert folder.entries == file.entries == sum(len(vector[name]) for name in vector)
    checkpoint, dense = ModelFolder(folder.path), load_file(file.path)
    assert checkpoint.digests() == ModelFolder(file.path).digests()
    assert {each.path.name for each in checkpoint.shards} == {each.path.name for each in ModelFolder(base).shards}
    assert dense.keys() == ModelFolder(base).tensors.keys()
    for name, values in dense.items():
        assert values.dtype == torch.float32
        expected = vector.to_torch(name, dense=True) if name in vector else torch.zeros_like(values)
        assert torch.equal(values, expected), name
    config = json.loads((folder.path / "config.json").read_text())
    assert config["dtype"] == "float32"
    for source in (folder.path, file.path):
        back = interop.from_delta(source, base)
        assert same(back, vector)
        back.save(tmp_path / "back.lota", force=True)
        taskvec.apply(tmp_path / "back.lota", base, tmp_path / "out", force=True)
        found, weights = load_file_of(tmp_path / "out"), load_file_of(base)
        for name, values in weights.items():
            assert torch.equal(found[name], (values.float() + dense[name]).to(values.dtype)), name
    assert sum(map(len, interop.from_delta(folder.path, base, 0.9).values())) == 1600


def load_file_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: values for file in folder.glob("*.safetensors") for name, values in load_file(file).items()}


def test_a_folder_is_divided_into_shards(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    vector = taskvec.diff(base, perturb(base, tmp_path / "tuned", dtype="float32"))
    interop.to_delta(vector, base, tmp_path / "delta", shard_size=20_000)
    assert len(list((tmp_path / "delta").glob("*.safetensors"))) > 1
    assert same(interop.from_delta(tmp_path / "delta", base), vector)
    with pytest.raises(UsageError, match="`shard_size` is for a folder"):
        interop.to_delta(vector, base, tmp_path / "delta.safetensors", shard_size=20_000)
    with pytest.raises(OutputExistsError):
        interop.to_delta(vector, base, tmp_path / "delta")


BASE = {"a": torch.tensor([0.0, -0.0, 1.0, 2.0]), "half": torch.ones(3).bfloat16(), "ids": torch.arange(3)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file(BASE, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def test_zeros_are_no_entries(base: Path, tmp_path: Path) -> None:
    deltas = {
        "a": torch.tensor([0.0, -0.0, 0.25, -0.0]).bfloat16(),
        "half": torch.zeros(3),
        "ids": torch.zeros(3, dtype=torch.int64),
    }
    save_file(deltas, tmp_path / "delta.safetensors")
    vector = interop.from_delta(tmp_path / "delta.safetensors", base)
    assert list(vector) == ["a"]
    assert (vector["a"].indices.tolist(), vector["a"].values.tolist()) == ([2], [0.25])


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ({"b": torch.ones(1)}, r"tensor 'b' is not in base"),
        ({"a": torch.ones(2, 2)}, r"tensor 'a' is \[2, 2\], but \[4\] in base"),
        ({"ids": torch.ones(3, dtype=torch.int64)}, r"tensor 'ids' is I64 \[3\] and I64 \[3\] in base.*be added"),
        ({"a": torch.tensor([0.0, torch.nan, 0.0, 0.0])}, r"tensor 'a' has a delta that is not a finite number of f32"),
        ({"a": torch.tensor([1e300, 0.0, 0.0, 0.0]).double()}, r"has a delta that is not a finite number of f32"),
        ({"a": torch.zeros(4)}, "changes nothing"),
    ],
)
def test_other_checkpoints_are_refused(
    base: Path, deltas: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    save_file(deltas, tmp_path / "delta.safetensors")
    with pytest.raises(ConversionError, match=message):
        interop.from_delta(tmp_path / "delta.safetensors", base)["a"]


def test_vectors_that_deltas_cannot_hold(base: Path, tmp_path: Path) -> None:
    save_file({**BASE, "a": torch.tensor([torch.nan, 1.0, 1.0, 2.0]), "ids": torch.ones(3).long()}, tmp_path / "tuned")
    vector = taskvec.diff(base, tmp_path / "tuned")
    written = interop.to_delta(vector, base, tmp_path / "delta.safetensors")
    assert (written.entries, written.dropped) == (1, 3)
    assert load_file(written.path)["a"].tolist() == [0.0, 1.0, 0.0, 0.0]
    with pytest.raises(KindError, match="is a patch"):
        interop.to_delta(taskvec.diff(base, tmp_path / "tuned", kind="patch"), base, tmp_path / "other.safetensors")
    save_file({**BASE, "a": torch.ones(4)}, tmp_path / "else.safetensors")
    with pytest.raises(BaseMismatchError, match=r"was taken from base.*, not from else"):
        interop.to_delta(vector, tmp_path / "else.safetensors", tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_the_command(base: Path, tmp_path: Path) -> None:
    save_file({**BASE, "a": BASE["a"] + 1}, tmp_path / "tuned.safetensors")
    taskvec.pack(base, tmp_path / "tuned.safetensors", tmp_path / "v.lota")
    delta = tmp_path / "delta.safetensors"
    said = ok("convert", tmp_path / "v.lota", "--base", base, "--to", "delta", "-o", delta)
    assert said == f"{delta}: a checkpoint of deltas; 4 are entries, the others are 0\n"
    command = ["convert", delta, "--base", base, "-o", tmp_path / "back.lota"]
    assert "does not say what it contains: --from must be coo or delta" in refused(2, *command)
    ok(*command, "--from", "delta")
    assert same(TaskVector.open(tmp_path / "back.lota"), TaskVector.open(tmp_path / "v.lota"))
    said = refused(2, "convert", tmp_path / "v.lota", "--to", "delta", "-o", tmp_path / "x.safetensors")
    assert "--to delta needs --base" in said
    said = refused(2, "convert", make_llama(tmp_path / "model"), "--base", base, "-o", tmp_path / "x.lota")
    assert "is a model folder: --from delta converts deltas, and taskvec pack stores a fine-tune" in said
