"""End-to-end tests of the command line on small models of real architectures."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from support.building import package, tensor, write_checkpoint
from support.commands import inside, ok, refused, taskvec
from support.models import ROWS, make_llama, perturb, write_rows

from taskvec import TaskVector
from taskvec_cli.main import app
from taskvec_formats import ModelFolder

pytestmark = pytest.mark.slow

COMMANDS = (
    "train",
    "pack",
    "unpack",
    "convert",
    "merge",
    "arith",
    "shrink",
    "inspect",
    "verify",
    "push",
    "pull",
    "eval",
    "search",
    "demo",
)
BATCHES = ("--batch-size", "2", "--device", "cpu")
UNCALIBRATED = ("--steps", "2", "--lr", "1e-3", *BATCHES)
QUICK = ("--calibration-steps", "2", *UNCALIBRATED)


def same_model(a: Path, b: Path) -> None:
    """Assert that every tensor of `a` equals that of `b`, byte for byte."""
    left, right = ModelFolder(a), ModelFolder(b)
    assert list(left.tensors) == list(right.tensors)
    for name, info in left.tensors.items():
        assert (info.dtype, info.shape) == (right.tensors[name].dtype, right.tensors[name].shape)
        assert np.array_equal(left.bits(name), right.bits(name)), name


@pytest.mark.parametrize(
    ("kind", "dtype", "shards"),
    [
        ("vector", "float32", (None, None)),
        ("patch", "bfloat16", ("30KB", "30KB")),
        ("vector", "float16", ("30KB", None)),
    ],
    ids=["1-1", "n-n", "n-1"],
)
def test_pack_and_unpack_give_the_tuned_model_back(
    kind: str, dtype: str, shards: tuple[str | None, str | None], tmp_path: Path
) -> None:
    base = make_llama(tmp_path / "base", dtype=dtype, shard_size=shards[0])
    tuned = perturb(base, tmp_path / "tuned", dtype=dtype, shard_size=shards[1])
    assert (len(ModelFolder(base).shards) > 1) is (shards[0] is not None)
    assert "lm_head.weight" not in ModelFolder(base).tensors, "tied embeddings are stored once"

    file = tmp_path / "x.lota"
    ok("pack", base, tuned, "-o", file, "--kind", kind, run=taskvec)
    said = ok("unpack", file, "--base", base, "-o", tmp_path / "out", run=taskvec)
    assert said.endswith("the tuned checkpoint, byte for byte\n")
    assert package(tmp_path / "out") == package(tuned)
    with safe_open(file, "np") as opened:
        assert opened.metadata()["taskvec"]
    assert "all intact" in ok("verify", file)
    assert f"all intact, and applies to {base} as expected" in ok("verify", file, "--base", base)


def test_what_unpack_writes_loads_and_computes(llama: Path, tuned: Path, vector: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ok("unpack", vector, "--base", llama, "-o", tmp_path / "out")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(p)(ids).logits for p in (tmp_path / "out", tuned)]
    assert torch.equal(*logits)


def test_single_files_pack_and_unpack(llama: Path, tuned: Path, tmp_path: Path) -> None:
    ok("pack", llama / "model.safetensors", tuned / "model.safetensors", "-o", tmp_path / "x.lota")
    ok("unpack", tmp_path / "x.lota", "--base", llama / "model.safetensors", "-o", tmp_path / "out")
    same_model(tmp_path / "out", tuned)


def test_pack_with_a_sparsity_keeps_the_largest(llama: Path, tuned: Path, tmp_path: Path) -> None:
    report = json.loads(ok("pack", llama, tuned, "-o", tmp_path / "x.lota", "--sparsity", "0.9", "--json"))
    base, after = ModelFolder(llama), ModelFolder(tuned)
    change = np.concatenate([np.abs(after.bits(n).view("<f4") - base.bits(n).view("<f4")) for n in base.tensors])
    assert report["entries"] == round(0.1 * change.size)
    kept = np.concatenate([np.abs(v.values) for v in TaskVector.open(tmp_path / "x.lota").values()])
    assert kept.min() == np.sort(change)[-len(kept)]
    ok("verify", tmp_path / "x.lota", "--base", llama)


def test_the_same_inputs_give_the_same_bytes(llama: Path, tuned: Path, vector: Path, tmp_path: Path) -> None:
    ok("pack", llama, tuned, "-o", tmp_path / "again.lota")
    provenance = TaskVector.open(vector).provenance
    assert TaskVector.open(tmp_path / "again.lota").provenance == provenance
    assert (tmp_path / "again.lota").read_bytes() == vector.read_bytes()


def test_train_merge_inspect(llama: Path, data: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        report = ok("train", llama, data, "-o", tmp_path / f"{seed}.lota", "--seed", seed, *QUICK, "--json")
        assert json.loads(report)["density"] == pytest.approx(0.1, abs=1e-3)
    a, b = tmp_path / "0.lota", tmp_path / "1.lota"

    said = ok("merge", a, b, cwd=tmp_path)
    assert "merged.lota: " in said
    assert "method: ties" in said
    assert "reason: the masks meet" in said
    ok("merge", a, b, "--base", llama, "-o", tmp_path / "model")
    ok("unpack", tmp_path / "merged.lota", "--base", llama, "-o", tmp_path / "unpacked")
    same_model(tmp_path / "model", tmp_path / "unpacked")

    found = json.loads(ok("inspect", a, b, tmp_path / "merged.lota", "--json", "--plot", tmp_path / "p.png"))
    assert [file["path"] for file in found["files"]] == [str(a), str(b), str(tmp_path / "merged.lota")]
    file, tensors = found["files"][0], found["files"][0]["tensors"]
    assert set(file) >= {"path", "kind", "entries", "eligible", "density", "bytes", "bits_per_entry", "base", "tensors"}
    assert set(tensors[0]) == {"name", "shape", "dtype", "origin", "entries", "density"}
    assert file["entries"] == sum(tensor["entries"] for tensor in tensors)
    assert file["bytes"] == a.stat().st_size
    pair = found["overlap"][0]
    assert len(found["overlap"]) == 3
    keys = "a b intersection union jaccard expected_jaccard sign_conflicts cosine"
    assert set(pair) == set(keys.split())
    sets = [{(name, i) for name, t in TaskVector.open(path).items() for i in t.indices} for path in (a, b)]
    assert pair["intersection"] == len(sets[0] & sets[1])
    assert pair["union"] == len(sets[0] | sets[1])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "chance" in ok("inspect", a, b)


def test_train_reports_what_it_did(llama: Path, data: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "x.lota", tmp_path / "losses.png"
    evaluated = ("--eval-data", data, "--eval-steps", "1", "--eval-metric", "rouge1")
    said = ok("train", llama, data, "-o", out, *QUICK, *evaluated, "--plot", picture)
    for line in (
        "first loss: ",
        "final loss: ",
        "tokens per second: ",
        "lowest evaluated loss: ",
        "highest rouge1: 0.",
    ):
        assert f"\n{line}" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "\nentries that change their weight: " in said
    report = json.loads(ok("train", llama, data, "-o", out, *QUICK, *evaluated, "--force", "--json"))
    assert [entry["step"] for entry in report["eval_metrics"]["rouge1"]] == [1, 2]
    assert report["eval_metrics"]["rouge1"][-1]["value"] == report["provenance"]["eval_rouge1"]
    mask = ok("train", llama, data, "-o", tmp_path / "mask.lota", *BATCHES, "--steps", "0")
    assert mask.count("\n") == 2
    assert "\ncalibration learning rate: " in mask
    dense = ok("train", llama, data, "-o", out, *UNCALIBRATED, "--method", "fft", "--force", "--json")
    report = json.loads(dense)
    assert report["trained"] == report["survived"] == report["entries"]
    assert report["free_share"] is None
    assert report["steps"] == 2
    assert report["provenance"]["run"]["options"]["method"] == "fft"
    real = ok("train", llama, data, "-o", out, *QUICK, "--force", "--gradient-checkpointing", run=taskvec)
    assert "final loss" in real


def test_a_run_without_unfinished_work_says_so(llama: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.lota"
    done = inside("train", llama, data, "-o", output, "--resume", "--mask", "random", "--steps", "0", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"taskvec: note: there is nothing to resume in {output}.run: the run starts anew\n"
    assert output.exists()


def test_training_requests_that_cannot_be_met(llama: Path, data: Path, tmp_path: Path) -> None:
    train = ("train", llama, data, "-o", tmp_path / "x.lota", *QUICK)
    assert "--mix takes DATA:SHARE" in refused(2, *train, "--mix", "rows.jsonl")
    assert "add up to less than 1" in refused(2, *train, "--mix", f"{data}:1.5")
    assert "no such file" in refused(2, *train, "--mix", f"{tmp_path / 'absent.jsonl'}:0.1")
    assert "no such file" in refused(2, *train, "--eval-data", tmp_path / "absent.jsonl")
    assert "method is one of lota, fft, lora" in refused(2, *train, "--method", "magic")
    assert "--method fft has no mask" in refused(2, *train, "--method", "fft", "--sparsity", "0.5")
    assert "a picture must be one of" in refused(2, *train, "--plot", tmp_path / "x.bmp")
    assert "needs examples to evaluate on" in refused(2, *train, "--patience", "1")
    assert "--report-to nowhere" in refused(2, *train, "--report-to", "nowhere")
    (tmp_path / "x.lota.run").mkdir()
    assert "--resume continues it" in refused(2, *train)
    ok(*train, "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["x.lota"]


def test_tickets_in_a_row_stay_disjoint_and_masks_are_reused(llama: Path, data: Path, tmp_path: Path) -> None:
    first, second, third, last = (tmp_path / f"{name}.lota" for name in ("first", "second", "third", "last"))
    ok("train", llama, data, "-o", first, *QUICK)
    said = ok("train", llama, data, "-o", second, "--disjoint-from", first, *QUICK)
    assert "entries that change their weight: " in said
    assert "free for later tasks: 80.0" in said
    earlier = ("--disjoint-from", first, "--disjoint-from", second)
    report = json.loads(ok("train", llama, data, "-o", third, *earlier, "--mask", "random", *UNCALIBRATED, "--json"))
    assert report["survived"] <= report["trained"] == report["entries"]
    assert report["free_share"] == pytest.approx(0.7, abs=1e-3)
    assert report["free"].keys() == set(TaskVector.open(third))
    overlaps = json.loads(ok("inspect", first, second, third, "--json"))["overlap"]
    assert [pair["intersection"] for pair in overlaps] == [0, 0, 0]

    ok("train", llama, data, "-o", last, "--mask-from", first, "--sparsity", "0.99", *UNCALIBRATED)
    whole, part = (TaskVector.open(path) for path in (first, last))
    assert all(np.isin(part[name].indices, whole[name].indices).all() for name in part)
    assert json.loads(ok("inspect", last, "--json"))["files"][0]["density"] == pytest.approx(0.01, abs=1e-3)
    full = ("--disjoint-from", first, "--sparsity", "0.05")
    assert "earlier masks leave" in refused(2, "train", llama, data, "-o", tmp_path / "no.lota", *full, *QUICK)
    assert "mask is one of" in refused(2, "train", llama, data, "-o", tmp_path / "no.lota", "--mask", "best", *QUICK)


def test_eval_scores_a_model_with_vectors_as_it_scores_the_result(
    llama: Path, tuned: Path, vector: Path, data: Path, tmp_path: Path
) -> None:
    on_data = ("--data", data, "--metric", "loss", "--metric", "exact_match", "--metric", "rouge1", "--json")
    asked = ("eval", llama, *on_data)
    patch, other = tmp_path / "patch.lota", tmp_path / "other.lota"
    ok("pack", llama, tuned, "-o", patch, "--kind", "patch")
    ok("train", llama, data, "-o", other, *QUICK)
    ok("merge", vector, other, "--base", llama, "-o", tmp_path / "merged")

    base, result = json.loads(ok(*asked, run=taskvec)), json.loads(ok("eval", tuned, *on_data))
    assert list(base["metrics"]) == ["loss", "exact_match", "rouge1"]
    assert base["metrics"]["loss"].keys() == {"value", "standard_error"}
    assert base["metrics"]["loss"] != result["metrics"]["loss"]
    expected = {"model": str(llama), "data": str(data), "examples": 4, "rows": base["rows"], "cut_prompts": 0}
    assert base["rows"].items() >= {"rows": 4, "truncated": 0, "longest": 13}.items()
    nothing = {"with": [], "method": None, "reason": None, "notes": [], "answers": None, "metrics": base["metrics"]}
    assert base == {**expected, **nothing}
    for file in (vector, patch):
        alone = {**nothing, "with": [str(file)], "metrics": result["metrics"]}
        assert json.loads(ok(*asked, "--with", file)) == {**expected, **alone}
    both = json.loads(ok(*asked, "--with", vector, "--with", other))
    assert (both["with"], both["method"]) == ([str(vector), str(other)], "ties")
    assert both["reason"].startswith("the masks meet, first in ")
    assert both["metrics"] == json.loads(ok("eval", tmp_path / "merged", *on_data))["metrics"]

    loss = base["metrics"]["loss"]
    assert (
        ok("eval", llama, "--data", data) == f"loss: {loss['value']:.3f} ± {loss['standard_error']:.3f} (4 examples)\n"
    )
    first = json.loads(ok("eval", llama, "--data", data, "--limit", "1", "--json"))
    assert (first["examples"], first["metrics"]["loss"]["standard_error"]) == (1, None)
    assert ok("eval", llama, "--data", data, "--limit", "1", "--metric", "rouge1", "--metric", "rouge1") == (
        "rouge1: 0.000 (1 example)\n"
    )
    said = ok("eval", llama, "--with", vector, "--with", other, "--data", data)
    assert said.splitlines()[0].startswith("merged by ties: the masks meet, first in ")


def test_eval_writes_answers(llama: Path, data: Path, tmp_path: Path) -> None:
    """The model has learned all examples, so exact match and ROUGE-1 are 1."""
    answers, three = tmp_path / "answers.jsonl", write_rows(tmp_path / "three.jsonl", ROWS[:3])
    slow = ("--calibration-steps", "2", "--steps", "60", "--lr", "1e-2", "--sparsity", "0.5", *UNCALIBRATED[2:4])
    ok("train", llama, three, "-o", tmp_path / "x.lota", *slow, "--device", "cpu")
    asked = ("eval", llama, "--with", tmp_path / "x.lota", "--data", three, "--answers", answers)
    metrics = ("--metric", "exact_match", "--metric", "rouge1")
    said = ok(*asked, *metrics, "--device", "cpu", "--batch-size", "2")
    scores = "exact_match: 1.000 ± 0.000 (3 examples)\nrouge1: 1.000 ± 0.000 (3 examples)\n"
    assert said == f"{scores}answers: {answers}\n"
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [row["answer"] for row in rows] == [row["completion"] for row in rows] == ["two", "three", "four"]
    assert [row["prompt"] for row in rows] == ["one plus one is", "one plus two is", "two plus two is"]

    answers.write_text("mine")
    assert "--force" in refused(2, *asked, *metrics)
    assert "--answers needs --metric exact_match or rouge1" in refused(2, *asked, "--force")
    assert answers.read_text() == "mine"
    ok(*asked, *metrics, "--max-new-tokens", "1", "--force")
    assert len(answers.read_text().splitlines()) == 3


def test_eval_refuses_what_it_cannot_do(llama: Path, gpt2: Path, vector: Path, data: Path, tmp_path: Path) -> None:
    other, absent = make_llama(tmp_path / "other", seed=7), tmp_path / "absent"
    # options are checked before the model is opened, which might have to be downloaded
    asked = ("eval", absent, "--data", data)
    assert "--metric is one of loss, exact_match, rouge1, found 'bleu'" in refused(2, *asked, "--metric", "bleu")
    for option in ("--batch-size", "--max-length", "--max-new-tokens", "--limit"):
        for value in ("0", "-1"):
            said = refused(2, *asked, option, value)
            assert f"{option[2:]} must be greater than zero, found {value}" in said
    assert "--device is one of auto, cpu" in refused(2, *asked, "--device", "toaster")
    assert "absent.jsonl: no such file" in refused(2, "eval", llama, "--data", tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert "the file is empty" in refused(1, "eval", llama, "--data", tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"txet": "two"}\n')
    assert "bad.jsonl:2: " in refused(1, "eval", llama, "--data", tmp_path / "bad.jsonl")
    assert inside("eval", llama).returncode == 2

    assert "no such file or folder" in refused(2, *asked)
    on_data = ("--data", data)
    assert "absent.lota" in refused(2, "eval", llama, *on_data, "--with", tmp_path / "absent.lota")
    assert "single file" in refused(2, "eval", llama / "model.safetensors", *on_data)
    assert "has other values" in refused(1, "eval", other, *on_data, "--with", vector)
    assert "has no tensor" in refused(1, "eval", gpt2, *on_data, "--with", vector, run=taskvec)
    ok("pack", llama, perturb(llama, tmp_path / "tuned", dtype="float32"), "-o", tmp_path / "x.lota", "--kind", "patch")
    assert "applied to tuned already" in refused(1, "eval", tmp_path / "tuned", *on_data, "--with", tmp_path / "x.lota")
    twice = ("--with", vector, "--with", tmp_path / "x.lota")
    assert "x.lota is a patch" in refused(1, "eval", llama, *on_data, *twice)
    too_long = ("--metric", "exact_match", "--max-length", "8", "--max-new-tokens", "8")
    assert "leave no room for a prompt" in refused(2, "eval", llama, *on_data, *too_long)


def test_eval_says_what_a_vector_changes_besides_weights(llama: Path, tuned: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path / "chatty")
    (tmp_path / "chatty" / "chat_template.jinja").write_text("{{ messages[0]['content'] }} is ")
    (tmp_path / "chatty" / "README.md").write_text("mine")
    ok("pack", llama, tmp_path / "chatty", "-o", tmp_path / "x.lota")
    done = inside("eval", llama, "--with", tmp_path / "x.lota", "--data", data)
    assert done.stderr == (
        "taskvec: warning: x.lota also changes chat_template.jinja: eval applies only its weights; "
        "unpack applies all of it\n"
    )
    assert done.stdout == ok("eval", tuned, "--data", data)


def test_merging_disjoint_tickets_adds_them_up(llama: Path, tuned: Path, tmp_path: Path) -> None:
    base, after = ModelFolder(llama), ModelFolder(tuned)
    halves = []
    for part in (0, 1):
        half = tmp_path / f"half{part}"
        shutil.copytree(llama, half)
        with (half / "model.safetensors").open("r+b") as file:
            for name, info in list(base.tensors.items())[part::2]:
                file.seek(info.start)
                file.write(after.bits(name).tobytes())
        halves.append(ok("pack", llama, half, "-o", tmp_path / f"{part}.lota"))
    said = ok("merge", tmp_path / "0.lota", tmp_path / "1.lota", "-o", tmp_path / "m.lota")
    assert "method: disjoint" in said
    assert "no two masks share a position" in said
    merged = TaskVector.open(tmp_path / "m.lota")
    parts = TaskVector.open(tmp_path / "0.lota"), TaskVector.open(tmp_path / "1.lota")
    for name in merged:
        source = next(part for part in parts if name in part)
        assert np.array_equal(merged[name].indices, source[name].indices)
        assert np.array_equal(merged[name].values, source[name].values)


def test_weights_scale_vectors(llama: Path, vector: Path, tmp_path: Path) -> None:
    ok("merge", vector, "-o", tmp_path / "m.lota", "--method", "linear", "--weights", "-0.5")
    before, after = TaskVector.open(vector), TaskVector.open(tmp_path / "m.lota")
    for name in before:
        assert np.array_equal(after[name].values, before[name].values * np.float32(-0.5))


@pytest.fixture
def states(tmp_path: Path) -> tuple[Path, Path]:
    """A base and a fine-tune that also resizes the vocabulary, removes a tensor and changes a side file."""
    rng = np.random.default_rng(0)
    embeddings, weights = rng.normal(size=(9, 4)), rng.normal(size=(30, 20))
    base = {"embed": tensor("F32", embeddings), "w": tensor("BF16", weights), "old": tensor("I64", [1])}
    tuned = {"embed": tensor("F32", rng.normal(size=(11, 4))), "w": tensor("BF16", weights * 1.01)}
    write_checkpoint(tmp_path / "base", base, 1, {"config.json": b"{}", "vocab.txt": b"a b"})
    write_checkpoint(tmp_path / "tuned", tuned, 2, {"config.json": b'{"more": 1}', "vocab.txt": b"a b"})
    return tmp_path / "base", tmp_path / "tuned"


def test_pack_reports_tensors_of_another_form(states: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = states
    other = "tensors removed: 1, of another shape or dtype: 1"
    _, line, *_ = ok("pack", base, tuned, "-o", tmp_path / "x.lota").splitlines()
    assert line == f"{other}; such a vector cannot be merged"
    _, line, *_ = ok("pack", base, tuned, "-o", tmp_path / "x.lota", "--kind", "patch", "--force").splitlines()
    assert line == other
    _, line, *_ = ok("pack", tuned, base, "-o", tmp_path / "back.lota").splitlines()
    assert line == "tensors added: 1, of another shape or dtype: 1; such a vector cannot be merged"


@pytest.mark.parametrize("kind", ["vector", "patch"])
def test_reports_as_json(kind: str, states: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = states
    file, out = tmp_path / "x.lota", tmp_path / "out"
    identities = {
        name: {"name": name, "fingerprint": ModelFolder(path).fingerprint}
        for name, path in (("base", base), ("tuned", tuned))
    }
    packed = json.loads(ok("pack", base, tuned, "-o", file, "--kind", kind, "--json"))
    vector = TaskVector.open(file)
    specs = list(vector.specs.values())
    entries = sum(spec.replaced if kind == "patch" else spec.entries for spec in specs)
    expected = {
        "path": str(file),
        "kind": kind,
        "entries": entries,
        "replaced": sum(spec.replaced for spec in specs),
        "eligible": 11 * 4 + 30 * 20,
        "density": entries / (11 * 4 + 30 * 20),
        "bytes": file.stat().st_size,
        "bits_per_entry": 8 * file.stat().st_size / entries,
        **identities,
        "removed": ["old"],
        "side_files": ["config.json", "model.safetensors.index.json"],
        "not_carried": [],
        "provenance": {"made_by": "pack"},
    }
    assert entries > 500
    assert packed == expected

    inspected = json.loads(ok("inspect", file, "--json"))
    assert inspected["overlap"] == []
    (found,) = inspected["files"]
    tensors = found.pop("tensors")
    assert found == expected
    assert [(t["name"], t["shape"], t["dtype"], t["origin"]) for t in tensors] == [
        ("embed", [11, 4], "F32", {"shape": [9, 4], "dtype": "F32"}),
        ("w", [30, 20], "BF16", {"shape": [30, 20], "dtype": "BF16"}),
    ]
    assert sum(t["entries"] for t in tensors) == entries

    verified = {"path": str(file), "ok": True, "tensors": 2, "base_checked": False}
    assert json.loads(ok("verify", file, "--json")) == verified
    assert json.loads(ok("verify", file, "--base", base, "--json")) == {**verified, "base_checked": True}

    report = json.loads(ok("unpack", file, "--base", base, "-o", out, "--json"))
    size = sum(shard.path.stat().st_size for shard in ModelFolder(tuned).shards)
    came = {"base": {"name": base.name, "revision": None}}
    exact = {"exact": True, "differences": [], "not_carried": [], **came}
    assert report == {"path": str(out), "tensors": 2, "files": 2, "bytes": size, **exact}
    assert package(out) == package(tuned)


def test_unpack_says_why_the_result_is_another(states: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = states
    ok("pack", base, tuned, "-o", tmp_path / "x.lota")
    (base / "vocab.txt").write_bytes(b"other")
    unpack = ("unpack", tmp_path / "x.lota", "--base", base, "-o", tmp_path / "out", "--force")
    why = "vocab.txt differs from the vector's base"
    assert ok(*unpack).endswith(f"not identical to the tuned checkpoint: {why}\n")
    (base / "vocab.txt").unlink()
    report = json.loads(ok(*unpack, "--json"))
    assert (report["exact"], report["differences"]) == (False, ["vocab.txt is not in the base"])


def test_a_result_that_is_not_known_is_not_called_exact(llama: Path, tuned: Path, tmp_path: Path) -> None:
    packed = json.loads(ok("pack", llama, tuned, "-o", tmp_path / "x.lota", "--sparsity", "0.5", "--json"))
    assert packed["tuned"] is None
    ok("merge", tmp_path / "x.lota", "-o", tmp_path / "m.lota")
    for name in ("x", "m"):
        said = ok("unpack", tmp_path / f"{name}.lota", "--base", llama, "-o", tmp_path / name)
        assert "byte for byte" not in said
        report = ok("unpack", tmp_path / f"{name}.lota", "--base", llama, "-o", tmp_path / name, "--force", "--json")
        assert (json.loads(report)["exact"], json.loads(report)["differences"]) == (None, [])


@pytest.mark.parametrize("kind", ["vector", "patch"])
def test_what_is_applied_already_is_not_applied_again(kind: str, llama: Path, tuned: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.lota"
    ok("pack", llama, tuned, "-o", file, "--kind", kind)
    ok("unpack", file, "--base", llama, "-o", tmp_path / "out")
    again = refused(1, "unpack", file, "--base", tmp_path / "out", "-o", tmp_path / "twice", run=taskvec)
    assert "x.lota is applied to out already: tensor " in again
    assert "is applied to out already" in refused(1, "verify", file, "--base", tmp_path / "out")
    assert not (tmp_path / "twice").exists()


def test_a_patch_is_inspected_alone_and_neither_merged_nor_compared(llama: Path, tuned: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "x.lota", tmp_path / "m"
    assert "entries of" in ok("pack", llama, tuned, "-o", file, "--kind", "patch")
    said = ok("inspect", file)
    assert f"{file}: patch, " in said
    assert "tuned: tuned" in said
    patch = "x.lota is a patch: it contains new bits, not deltas; use --kind vector"
    assert patch in refused(1, "merge", file, "-o", out)
    assert patch in refused(1, "merge", file, file, "--base", llama, "-o", out)
    assert patch in refused(1, "inspect", file, file)
    assert patch in refused(1, "inspect", file, file, "--json")
    assert sorted(tmp_path.iterdir()) == [file]


def test_a_kind_or_codec_that_is_not_known_is_refused(llama: Path, tuned: Path, tmp_path: Path) -> None:
    pack = ("pack", llama, tuned, "-o", tmp_path / "x.lota")
    assert "kind is one of vector, patch, found 'zip'" in refused(2, *pack, "--kind", "zip")
    assert "codec is one of auto, fast, paper64, plain, found 'zip'" in refused(2, *pack, "--codec", "zip")
    assert "--sparsity needs --kind vector" in refused(2, *pack, "--kind", "patch", "--sparsity", "0.9")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--codec", "zip"), "codec is one of"),
        (("--kind", "zip"), "kind is one of"),
        (("--sparsity", "2"), "between 0 and 1"),
        (("--sparsity", "0.9", "--kind", "patch"), "needs --kind vector"),
    ],
    ids=["codec", "kind", "sparsity", "sparse patch"],
)
def test_options_are_refused_before_any_model_is_looked_for(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    """The model might have to be downloaded."""
    absent = tmp_path / "absent"
    assert message in refused(2, "pack", absent, absent, "-o", tmp_path / "x.lota", *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("codec", ["auto", "paper64", "plain"])
def test_every_codec_can_be_asked_for(codec: str, llama: Path, tuned: Path, tmp_path: Path) -> None:
    ok("pack", llama, tuned, "-o", tmp_path / "x.lota", "--codec", codec)
    blocks = [block for spec in TaskVector.open(tmp_path / "x.lota").specs.values() for block in spec.blocks]
    used = {block.delta.positions.codec for block in blocks}
    assert used == {codec} if codec != "auto" else used <= {"gaps", "plain"}
    ok("unpack", tmp_path / "x.lota", "--base", llama, "-o", tmp_path / "out")
    assert package(tmp_path / "out") == package(tuned)


def test_what_cannot_be_read_is_refused(llama: Path, tuned: Path, vector: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.lota"
    (tmp_path / "hollow").mkdir()
    (tmp_path / "junk.lota").write_bytes(b"PK\x03\x04 not a lota file")
    assert "no such file or folder" in refused(2, "pack", tmp_path / "absent", tuned, "-o", out)
    assert "no-such-org/no-such-model" in refused(1, "pack", "no-such-org/no-such-model", tuned, "-o", out)
    assert "holds no .safetensors file" in refused(2, "pack", llama, tmp_path / "hollow", "-o", out)
    assert "not a safetensors file" in refused(1, "inspect", tmp_path / "junk.lota")
    assert "absent.lota" in refused(2, "inspect", tmp_path / "absent.lota")
    assert "not a .lota file" in refused(2, "inspect", llama / "model.safetensors")
    assert "a picture must be one of" in refused(2, "inspect", vector, "--plot", tmp_path / "p.txt")
    assert not out.exists()


def test_the_wrong_base_is_refused(llama: Path, llama_bf16: Path, gpt2: Path, vector: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", seed=7)
    out = tmp_path / "out"
    assert "BF16" in refused(1, "unpack", vector, "--base", llama_bf16, "-o", out)
    assert "has no tensor" in refused(1, "unpack", vector, "--base", gpt2, "-o", out)
    assert "has other values" in refused(1, "unpack", vector, "--base", other, "-o", out)
    assert "not the base" in refused(1, "verify", vector, "--base", other)
    assert "not two states of one model" in refused(1, "pack", llama, gpt2, "-o", tmp_path / "x.lota")
    perturb(other, tmp_path / "other-tuned", dtype="float32")
    ok("pack", other, tmp_path / "other-tuned", "-o", tmp_path / "other.lota")
    assert "different bases" in refused(1, "merge", vector, tmp_path / "other.lota", "-o", tmp_path / "m.lota")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "other-tuned", "other.lota"]


@pytest.mark.parametrize("sparsity", ["0", "1", "-0.5", "1.5", "nan"])
def test_a_sparsity_outside_0_1_is_refused(sparsity: str, llama: Path, tuned: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.lota"
    assert "between 0 and 1" in refused(2, "pack", llama, tuned, "-o", out, "--sparsity", sparsity)
    assert "between 0 and 1" in refused(2, "train", llama, data, "-o", out, "--sparsity", sparsity)
    assert not list(tmp_path.iterdir())


def test_bad_data_is_named(llama: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "bad.jsonl", tmp_path / "x.lota"
    assert "no such file" in refused(2, "train", llama, tmp_path / "absent.jsonl", "-o", out)
    data.write_text('{"text": "one"}\n{"txet": "two"}\n')
    assert f"{data}:2: " in refused(1, "train", llama, data, "-o", out)
    data.write_text("")
    assert "empty" in refused(1, "train", llama, data, "-o", out)
    assert not out.exists()


def test_bad_requests_are_refused(llama: Path, vector: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.lota"
    assert "2 weights for 1 vectors" in refused(2, "merge", vector, "-o", out, "--weights", "1,2")
    assert "'one'" in refused(2, "merge", vector, "-o", out, "--weights", "one")
    assert "finite" in refused(2, "merge", vector, "-o", out, "--weights", "inf")
    assert "no merge method 'magic'" in refused(2, "merge", vector, "-o", out, "--method", "magic")
    assert "not disjoint" in refused(1, "merge", vector, vector, "-o", out, "--method", "disjoint")
    for missing in (["pack", llama], ["merge"], ["unpack", vector, "-o", out], ["train", llama]):
        assert inside(*missing).returncode == 2
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_refused_without_force(llama: Path, tuned: Path, vector: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "x.lota", tmp_path / "model"
    file.write_text("mine")
    assert "--force" in refused(2, "pack", llama, tuned, "-o", file)
    assert file.read_text() == "mine"
    ok("pack", llama, tuned, "-o", file, "--force")
    ok("verify", file)

    ok("unpack", vector, "--base", llama, "-o", folder)
    assert "--force" in refused(2, "unpack", vector, "--base", llama, "-o", folder)
    ok("unpack", vector, "--base", llama, "-o", folder, "--force")
    same_model(folder, tuned)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "x.lota"]


def test_force_never_replaces_a_folder_that_is_no_model(llama: Path, vector: Path, tmp_path: Path) -> None:
    precious = tmp_path / "home" / "letter.txt"
    precious.parent.mkdir()
    precious.write_text("dear")
    assert "contains no model" in refused(2, "unpack", vector, "--base", llama, "-o", precious.parent, "--force")
    assert "is an input" in refused(2, "unpack", vector, "--base", llama, "-o", llama, "--force")
    assert "is a folder" in refused(2, "merge", vector, "-o", precious.parent, "--force")
    assert "is a file" in refused(2, "unpack", vector, "--base", llama, "-o", precious, "--force")
    assert precious.read_text() == "dear"


def test_a_damaged_file_is_named(vector: Path, tmp_path: Path) -> None:
    data = bytearray(vector.read_bytes())
    data[-3] ^= 1
    (tmp_path / "x.lota").write_bytes(data)
    said = refused(1, "verify", tmp_path / "x.lota")
    assert "x.lota: tensor 'model.norm.weight', block at element 0, byte " in said
    assert "the stored bytes do not have the digest" in said


def test_a_killed_unpack_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", shard_size="5KB")
    ok("pack", base, perturb(base, tmp_path / "tuned", dtype="float32"), "-o", tmp_path / "x.lota")
    # killed while it writes into the hidden folder, so that no clean-up can run
    program = (
        "import os, signal, sys\n"
        "from taskvec import apply\n"
        "def stop(stage, done, total, note):\n"
        "    if stage == 'applying' and done == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "apply(sys.argv[1], sys.argv[2], sys.argv[3], progress=stop)\n"
    )
    arguments = [tmp_path / "x.lota", base, tmp_path / "out"]
    killed = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    ok("unpack", tmp_path / "x.lota", "--base", base, "-o", tmp_path / "out")
    same_model(tmp_path / "out", tmp_path / "tuned")


def test_help_documents_every_command_and_option() -> None:
    import typer

    root = typer.main.get_command(app)
    assert set(root.commands) == set(COMMANDS)
    for name, command in root.commands.items():
        said = ok(name, "--help")
        assert command.help.splitlines()[-1].startswith(f"Example: taskvec {name} ")
        for parameter in command.params:
            assert all(option in said for option in parameter.opts if option.startswith("--")), (name, parameter.name)
    assert ok("--version").startswith("taskvec ")
    assert inside("--help").stdout.count("│") > 2 * len(COMMANDS)
