"""End-to-end tests of `taskvec merge` on a small model of a real architecture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import ok, refused
from support.models import perturb

from taskvec import TaskVector, diff, merge
from taskvec_formats import ModelFolder


@pytest.fixture(scope="module")
def second(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `.lota` file of another fine-tune of `llama`."""
    folder = tmp_path_factory.mktemp("second")
    tuned = perturb(llama, folder / "tuned", dtype="float32", seed=2)
    diff(ModelFolder(llama), ModelFolder(tuned)).save(folder / "second.lota")
    return folder / "second.lota"


def values(vector: TaskVector) -> dict[str, Any]:
    return {name: (vector[name].indices.tolist(), vector[name].values.tolist()) for name in vector}


def test_options_reach_the_method(vector: Path, second: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.lota"
    parents = [TaskVector.open(vector), TaskVector.open(second)]
    for method, given, options in (
        ("ties", ["--density", "0.2", "--dialect", "mergekit"], {"density": 0.2, "dialect": "mergekit"}),
        ("ties", ["--elect", "frequency", "--no-normalize"], {"elect": "frequency", "normalize": False}),
        ("dare_linear", ["--density", "0.5,0.3", "--seed", "4"], {"density": [0.5, 0.3], "seed": 4}),
        ("breadcrumbs", ["--density", "0.3", "--gamma", "0.05"], {"density": 0.3, "gamma": 0.05}),
        ("dare_ties", ["--density", "0.3", "--rescale", "norm"], {"density": 0.3, "rescale": "norm"}),
        ("disjoint", ["--on-overlap", "mean"], {"on_overlap": "mean"}),
        ("average", ["--weights", "1,3", "--lambda", "2"], {"weights": [1.0, 3.0], "lam": 2.0}),
    ):
        report = json.loads(ok("merge", vector, second, "-o", out, "--method", method, *given, "--force", "--json"))
        assert (report["method"], report["reason"]) == (method, "asked for")
        written, expected = TaskVector.open(out), merge(parents, method, **options)
        assert values(written) == values(expected)
        assert written.provenance == expected.provenance


def test_a_setting_without_effect_is_said(vector: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.lota"
    said = ok("merge", vector, "-o", out, "--method", "ties", "--density", "1.0", "--dialect", "mergekit")
    assert "note" not in said
    sparse = tmp_path / "sparse.lota"
    opened = TaskVector.open(vector)
    merge([opened], "magnitude_prune", density=0.1).save(sparse)
    command = ("merge", sparse, "-o", out, "--method", "ties", "--density", "0.5", "--force")
    assert "note: density 0.5 trims nothing from sparse.lota, whose own density is " in ok(*command)
    assert json.loads(ok(*command, "--json"))["notes"] == TaskVector.open(out).provenance["notes"]


def test_a_model_folder_has_a_card_shards_and_a_dtype(llama: Path, vector: Path, second: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    options = ("--method", "ties", "--weights", "1,0.5", "--density", "0.4")
    said = ok(
        "merge", vector, second, "--base", llama, "-o", out, *options, "--shard-size", "10kB", "--dtype", "bfloat16"
    )
    written = ModelFolder(out)
    assert f"{out}: {len(written.tensors)} tensors in {len(written.shards)} file(s)" in said
    assert len(written.shards) > 2
    assert {info.dtype.name for info in written.tensors.values()} == {"BF16"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    card = (out / "README.md").read_text()
    for line in (
        "# model",
        "- merge",
        "Method: [ties](https://arxiv.org/abs/2306.01708)",
        f"| tuned.lota | 1.0 | `{TaskVector.open(vector).digest}` |",
        f"| second.lota | 0.5 | `{TaskVector.open(second).digest}` |",
        "| density | 0.4 |",
        "| dialect | reference |",
    ):
        assert line in card
    merged = merge([TaskVector.open(vector), TaskVector.open(second)], "ties", [1, 0.5], density=0.4)
    base = ModelFolder(llama)
    for name in written.tensors:
        dense = base.bits(name).view(np.float32).copy()
        if name in merged:
            dense[merged[name].indices] += merged[name].values
        found = (written.bits(name).astype(np.uint32) << 16).view(np.float32)
        assert np.allclose(found, dense, rtol=1 / 128, atol=0)
    assert not (tmp_path / "model.part").exists()


def test_a_recipe_says_all_but_the_output(llama: Path, vector: Path, second: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "merge.yaml"
    models = f"models:\n- {{model: {vector}, parameters: {{weight: 0.5}}}}\n- {{model: {second}}}\n"
    recipe.write_text(f"merge_method: task_arithmetic\nbase_model: {llama}\ndtype: float16\n{models}")
    said = ok("merge", "--recipe", recipe, cwd=tmp_path)
    assert "merged: " in said
    assert "method: linear" in said
    assert {info.dtype.name for info in ModelFolder(tmp_path / "merged").tensors.values()} == {"F16"}
    ok("merge", "--recipe", recipe, "-o", tmp_path / "m.lota")
    expected = merge([TaskVector.open(vector), TaskVector.open(second)], "linear", [0.5, 1])
    assert values(TaskVector.open(tmp_path / "m.lota")) == values(expected)

    recipe.write_text(f"merge_method: ties\n{models}")
    assert "names no base_model, so only a .lota file can be written" in refused(2, "merge", "--recipe", recipe)
    ok("merge", "--recipe", recipe, "-o", tmp_path / "n.lota")
    given = ["--method", "ties"], ["--weights", "1,2"], ["--base", llama], ["--density", "0.5"]
    for option in (*given, ["--lambda", "0"], ["--seed", "0"], ["--normalize"]):
        message = refused(2, "merge", "--recipe", recipe, *option, "-o", tmp_path / "x.lota")
        assert f"{option[0]} cannot be used with --recipe: the recipe names the models and all options" in message
    assert "--normalize cannot be used with" in refused(2, "merge", "--recipe", recipe, "--no-normalize")
    assert "VECTORS cannot be used with --recipe" in refused(2, "merge", vector, "--recipe", recipe)
    recipe.write_text(f"merge_method: ties\nspeed: 3\ndtype: float16\n{models}")
    said = ok("merge", "--recipe", recipe, "-o", tmp_path / "o.lota")
    assert "note: the key speed has no effect" in said
    assert "note: dtype float16 has no effect on a .lota file" in said


def test_options_of_one_kind_of_output_are_refused_for_the_other(llama: Path, vector: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "m")
    for option in (["--dtype", "bfloat16"], ["--shard-size", "1GB"], ["--resume"]):
        assert f"{option[0]} is for a model folder" in refused(2, "merge", vector, *out, *option)
    folder = ("merge", vector, "--base", llama, *out)
    assert "--codec is for a .lota file" in refused(2, *folder, "--codec", "fast")
    assert "dtype is one of float32, bfloat16, float16, found 'int4'" in refused(2, *folder, "--dtype", "int4")
    assert "--shard-size must be a size with a unit, such as 500MB or 2GB, found 'big'" in refused(
        2, *folder, "--shard-size", "big"
    )
    assert "--density takes numbers separated by commas" in refused(2, *folder, "--density", "all")
    assert "linear has no option --seed; it has --normalize" in refused(2, *folder, "--method", "linear", "--seed", "3")
    for option, message in (
        (["--method", "disjoint", "--on-overlap", "fight"], "--on-overlap is one of error, sum, mean, larger, first"),
        (["--method", "ties", "--elect", "lot"], "--elect is one of mass, frequency, found 'lot'"),
        (["--method", "breadcrumbs", "--density", "0.1", "--gamma", "1"], "--gamma must be at least 0 and below 1"),
        (["--method", "ties", "--option", "density=0.1"], "--option is for the options of methods: use --density for"),
        (["--method", "average", "--no-normalize"], "average has no option --normalize; it has none"),
    ):
        assert f"taskvec: {message}" in refused(2, *folder, *option)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["2", "2B", "1000", "5b", "-1MB", "1e9", "GB", "1,5GB", "9" * 5000 + "GB"])
def test_a_shard_size_needs_a_unit(size: str, llama: Path, vector: Path, tmp_path: Path) -> None:
    message = refused(2, "merge", vector, "--base", llama, "-o", tmp_path / "m", f"--shard-size={size}")
    assert "--shard-size must be a size with a unit, such as 500MB or 2GB, found '" in message
    assert len(message) < 250
    assert list(tmp_path.iterdir()) == []


def test_shard_sizes_are_read_as_transformers_reads_them() -> None:
    from taskvec_cli.outputs import parse_size

    sizes = {"2GB": 2 * 10**9, "1.5kB": 1500, "1 MiB": 2**20, "3T": 3 * 10**12}
    assert {text: parse_size("--shard-size", text) for text in sizes} == sizes


def test_a_path_that_ends_in_a_slash_is_a_folder(llama: Path, vector: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/m/"
    for command in (["merge", vector], ["pack", llama, llama], ["arith", vector]):
        assert "the output is a file" in refused(2, *command, "-o", out)
    assert list(tmp_path.iterdir()) == []
    ok("merge", vector, "--base", llama, "-o", out)
    assert ModelFolder(tmp_path / "m").tensors
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(f"merge_method: ties\nbase_model: {llama}\nmodels: [{{model: {vector}}}]")
    ok("merge", "--recipe", recipe, "-o", f"{tmp_path}/n/")
    assert ModelFolder(tmp_path / "n").tensors
    said = refused(2, "merge", "--recipe", recipe, "-o", f"{tmp_path}/m.lota/")
    assert "m.lota: a name that ends in .lota is for a task vector; the output is a model folder" in said


def test_what_is_no_lota_file_is_called_by_what_it_is(llama: Path, vector: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "merge.yaml").write_text("merge_method: ties")
    weights = llama / "model.safetensors"
    os.mkfifo(tmp_path / "pipe")
    found = {
        llama: (
            2,
            f"{llama} is a model folder, not a .lota file: compute its difference from the base first (taskvec pack or",
        ),
        weights: (
            2,
            "not a .lota file: a safetensors file without a taskvec description; if it is a checkpoint, compute",
        ),
        tmp_path / "empty": (2, "is a folder, not a .lota file, and contains no model"),
        tmp_path / "merge.yaml": (2, f"is merged by taskvec merge --recipe {tmp_path / 'merge.yaml'}"),
        tmp_path / "pipe": (2, "is not a regular file; expected a .lota file"),
    }
    for path, (code, message) in found.items():
        for command in (["merge", vector, path], ["inspect", path], ["verify", path]):
            assert message in refused(code, *command)


def test_a_vector_given_twice_is_said(vector: Path, second: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.lota"
    copy.write_bytes(vector.read_bytes())
    said = ok("merge", vector, second, copy, vector, "-o", tmp_path / "m.lota")
    assert f"note: {vector.name} and copy.lota are the same vector, which counts each time" in said
    assert f"note: {vector.name} is given twice and counts each time" in said
    assert "same vector" not in ok("merge", vector, second, "-o", tmp_path / "n.lota")


def test_the_base_of_a_recipe_must_be_that_of_its_files(llama: Path, vector: Path, tmp_path: Path) -> None:
    other = perturb(llama, tmp_path / "other", dtype="float32", seed=7)
    recipe = tmp_path / "merge.yaml"
    for method in ("task_arithmetic", "linear"):
        recipe.write_text(f"merge_method: {method}\nbase_model: {other}\nmodels: [{{model: {vector}}}]")
        for out in ("m.lota", "m"):
            assert "other is not the base of" in refused(1, "merge", "--recipe", recipe, "-o", tmp_path / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge.yaml", "other"]
    recipe.write_text(f"merge_method: linear\nbase_model: {llama}\nmodels: [{{model: {vector}}}]")
    ok("merge", "--recipe", recipe, "-o", tmp_path / "m.lota")


def test_an_unfinished_merge_is_not_removed_for_a_request_that_is_refused(
    llama: Path, vector: Path, tmp_path: Path
) -> None:
    part = tmp_path / "m.part"
    part.mkdir()
    (part / "run.json").write_text('{"kind": "merge"}')
    folder = ("merge", vector, "--base", llama, "-o", tmp_path / "m", "--force")
    refused(2, *folder, "--shard-size", "big")
    refused(2, *folder, "--dtype", "int4")
    assert (part / "run.json").exists()
    ok(*folder)
    assert not part.exists()


def test_a_quick_codec_holds_the_same(vector: Path, second: Path, tmp_path: Path) -> None:
    for codec in ("auto", "fast", "plain", "paper64"):
        ok("merge", vector, second, "-o", tmp_path / f"{codec}.lota", "--codec", codec)
        assert values(TaskVector.open(tmp_path / f"{codec}.lota")) == values(TaskVector.open(tmp_path / "auto.lota"))
    assert "codec is one of auto, fast, paper64, plain, found 'zip'" in refused(
        2, "merge", vector, "-o", tmp_path / "x.lota", "--codec", "zip"
    )
