"""Two fine-tunes of a model of each architecture: packed, unpacked, inspected and merged, equal to dense arithmetic."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.architectures import ARCHITECTURES, NAMES, write_pair
from support.building import Tensor, package
from support.commands import ok
from support.dense_merge import merged, trimmed
from support.folder_oracle import Oracle
from support.peer_folders import Case
from transformers import PreTrainedModel

from taskvec import TaskVector
from taskvec_formats import ModelFolder
from taskvec_formats.dtypes import DType

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings come from the models' own code

WEIGHTS = (0.7, 0.45)
DENSITY = 0.3


@dataclass(frozen=True)
class Trio:
    """A base and two fine-tunes, in memory and as folders, and their vectors.

    Attributes:
        folder: The folder with base/, one/, two/, one.lota and two.lota.
        models: The base and the fine-tunes.
    """

    folder: Path
    models: tuple[PreTrainedModel, ...]

    def checkpoint(self, name: str) -> ModelFolder:
        return ModelFolder(self.folder / name)

    def deltas(self) -> Iterator[tuple[str, DType, np.ndarray, list[np.ndarray]]]:
        """Yield the name and dtype of every tensor, the values of the base and both deltas, f32 [size]."""
        base, *others = (self.checkpoint(name) for name in NAMES)
        for name, info in base.tensors.items():
            start, *ends = (each.bits(name).view(info.dtype.real).astype(np.float32) for each in (base, *others))
            yield name, info.dtype, start, [end - start for end in ends]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def trio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    folder = tmp_path_factory.mktemp(request.param)
    models = write_pair(request.param, folder)
    assert len(list((folder / "base").glob("*.safetensors"))) > 1
    for name in ("one", "two"):
        ok("pack", folder / "base", folder / name, "-o", folder / f"{name}.lota")
    return Trio(folder, models)


def test_unpacking_gives_every_file_of_the_fine_tune(trio: Trio, tmp_path: Path) -> None:
    for name in ("one", "two"):
        ok("unpack", trio.folder / f"{name}.lota", "--base", trio.folder / "base", "-o", tmp_path / name)
        assert package(tmp_path / name) == package(trio.folder / name)
    ok("verify", trio.folder / "one.lota", trio.folder / "two.lota", "--base", trio.folder / "base")
    assert {info.dtype.name for info in trio.checkpoint("base").tensors.values()} == {"BF16", "F16", "F32"}


def test_inspect_counts_the_entries_and_compares_the_masks(trio: Trio) -> None:
    names = [trio.folder / "one.lota", trio.folder / "two.lota"]
    report = json.loads(ok("inspect", *names, "--json"))
    deltas = {name: found for name, _, _, found in trio.deltas()}
    for place, file in enumerate(report["files"]):
        expected = {name: np.count_nonzero(found[place]) for name, found in deltas.items()}
        assert {each["name"]: each["entries"] for each in file["tensors"]} == {k: n for k, n in expected.items() if n}
        assert file["entries"] == sum(expected.values())
        assert file["eligible"] == sum(found[place].size for name, found in deltas.items() if expected[name])
    one, two = (np.concatenate([found[place] for found in deltas.values()]) for place in (0, 1))
    (pair,) = report["overlap"]
    shared = (one != 0) & (two != 0)
    assert pair["intersection"] == shared.sum() > 0
    assert pair["union"] == ((one != 0) | (two != 0)).sum()
    assert pair["sign_conflicts"] == (shared & ((one > 0) != (two > 0))).sum() > 0
    one, two = one.astype(np.float64), two.astype(np.float64)
    assert pair["cosine"] == pytest.approx(one @ two / np.sqrt((one @ one) * (two @ two)), rel=1e-12)


@pytest.mark.parametrize("merge", ["linear", "ties", "trimmed ties"])
def test_a_merge_equals_dense_arithmetic(trio: Trio, merge: str, tmp_path: Path) -> None:
    method = "linear" if merge == "linear" else "ties"
    options = ["--method", method, "--weights", ",".join(map(str, WEIGHTS))]
    parts = [{name: found[place] for name, _, _, found in trio.deltas()} for place in (0, 1)]
    if merge == "trimmed ties":
        options += ["--density", str(DENSITY)]
        parts = [trimmed(part, DENSITY) for part in parts]
    vectors = [trio.folder / "one.lota", trio.folder / "two.lota"]
    base = trio.folder / "base"
    ok("merge", *vectors, *options, "-o", tmp_path / "merged.lota")
    ok("merge", *vectors, *options, "--base", base, "-o", tmp_path / "merged")
    ok("merge", trio.folder / "one", vectors[1], *options, "--base", base, "-o", tmp_path / "of-folders")
    ok("unpack", tmp_path / "merged.lota", "--base", base, "-o", tmp_path / "applied")

    vector, folder = TaskVector.open(tmp_path / "merged.lota"), ModelFolder(tmp_path / "merged")
    assert folder.tensors.keys() == trio.checkpoint("base").tensors.keys()
    for name, dtype, start, _ in trio.deltas():
        expected = merged(method, [part[name] for part in parts], WEIGHTS)
        found = np.zeros_like(expected)
        if name in vector:
            found[vector[name].indices] = vector[name].values
        np.testing.assert_array_equal(found, expected, err_msg=name)
        # where nothing changes, a zero of the base keeps its sign
        after = np.where(expected == 0, start, start + expected)
        assert folder.bits(name).tobytes() == after.astype(dtype.real).tobytes(), name
    for other in ("applied", "of-folders"):
        for shard in (tmp_path / "merged").glob("*.safetensors*"):
            assert (tmp_path / other / shard.name).read_bytes() == shard.read_bytes()


def test_transformers_computes_the_same_with_the_merged_folder(trio: Trio, tmp_path: Path) -> None:
    weights = ",".join(map(str, WEIGHTS))
    base, vectors = trio.folder / "base", [trio.folder / "one.lota", trio.folder / "two.lota"]
    ok("merge", *vectors, "--method", "ties", "--weights", weights, "--base", base, "-o", tmp_path / "merged")
    expected = copy.deepcopy(trio.models[0])
    with torch.no_grad():
        for here, *others in zip(*(model.parameters() for model in (expected, *trio.models[1:])), strict=True):
            start = here.float().numpy()
            change = merged("ties", [other.float().numpy() - start for other in others], WEIGHTS)
            here.data = torch.from_numpy(start + change).to(here.dtype).float()
    loaded = type(expected).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.tensor([[1, 9, 17, 33, 8, 21, 40, 11]])
    with torch.no_grad():
        one, two, before = (model(input_ids=ids).logits for model in (loaded, expected, trio.models[0].float()))
    assert torch.equal(one, two)
    assert not torch.equal(one, before)


RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"dtype": "bfloat16"},
    "ties": {
        "base_model": "base",
        "parameters": {"density": 0.4, "normalize": True},
        "dtype": "float32",
        "out_dtype": "float16",
    },
}


@pytest.mark.parametrize("trio", ["Qwen3MoeForCausalLM", "MambaForCausalLM"], indirect=True)
@pytest.mark.parametrize("method", RECIPES)
def test_a_recipe_equals_a_dense_merge_in_the_way_of_mergekit(trio: Trio, method: str, tmp_path: Path) -> None:
    models = [{"model": name, "parameters": {"weight": w}} for name, w in zip(("one", "two"), WEIGHTS, strict=True)]
    document = {"merge_method": method, "models": models, **RECIPES[method]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    ok("merge", "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "merged", "--json", cwd=trio.folder)
    states = {
        name: {
            each: Tensor(info.dtype, info.shape, trio.checkpoint(name).bits(each))
            for each, info in trio.checkpoint(name).tensors.items()
        }
        for name in NAMES
    }
    oracle, found = Oracle(Case(document, 2, states, {}, frozenset())), ModelFolder(tmp_path / "merged")
    assert found.tensors.keys() == states["base"].keys()
    for name, info in found.tensors.items():
        expected = oracle.tensor(name)
        assert (info.dtype, info.shape) == (expected.dtype, expected.shape), name
        assert found.bits(name).tobytes() == expected.bits.tobytes(), name
