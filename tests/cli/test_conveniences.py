"""What people expect of the commands: several files, folders in place of vectors, parents, alike exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.building import tensor, write_checkpoint
from support.commands import inside, ok, refused
from support.models import perturb, write_rows

from taskvec import TaskVector, diff, merge
from taskvec_cli.main import app

MAIN = "from taskvec_cli.main import main; main()"


@pytest.fixture
def pair(llama: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two vectors of one base."""
    paths = tmp_path / "first.lota", tmp_path / "second.lota"
    for seed, path in enumerate(paths, 1):
        perturb(llama, tmp_path / path.stem, dtype="float32", seed=seed)
        diff(llama, tmp_path / path.stem, 0.9).save(path)
    return paths


def test_a_missing_model_and_a_missing_vector_end_alike(llama: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone.lota"
    for command in (["verify", gone], ["inspect", gone], ["merge", gone], ["unpack", gone, "--base", llama, "-o", "x"]):
        assert refused(2, *command) == f"taskvec: {gone}: no such file\n"
    assert "no such file or folder" in refused(2, "pack", gone, llama, "-o", tmp_path / "x.lota")


def test_several_files_are_verified(pair: tuple[Path, Path], llama: Path, tmp_path: Path) -> None:
    said = ok("verify", *pair, "--base", llama)
    assert [line.split(":")[0] for line in said.splitlines()] == [str(path) for path in pair]
    reports = json.loads(ok("verify", *pair, "--json"))
    assert [report["path"] for report in reports] == [str(path) for path in pair]
    damaged = bytearray(pair[1].read_bytes())
    damaged[-1] ^= 1
    pair[1].write_bytes(damaged)
    assert "second.lota" in refused(1, "verify", *pair)


def test_fine_tunes_are_merged_without_a_recipe(pair: tuple[Path, Path], llama: Path, tmp_path: Path) -> None:
    folders = [path.with_suffix("") for path in pair]
    ok("merge", *folders, "--base", llama, "--method", "linear", "-o", tmp_path / "merged")
    packed = [tmp_path / f"{folder.name}-whole.lota" for folder in folders]
    for folder, path in zip(folders, packed, strict=True):
        ok("pack", llama, folder, "-o", path)
    ok("merge", *packed, "--base", llama, "--method", "linear", "-o", tmp_path / "expected")
    assert [path.read_bytes() for path in sorted((tmp_path / "merged").glob("*.safetensors"))] == [
        path.read_bytes() for path in sorted((tmp_path / "expected").glob("*.safetensors"))
    ]
    assert "is an input" in refused(2, "merge", *folders, "--base", llama, "-o", folders[0], "--force")
    assert "is a model folder, not a .lota file" in refused(2, "merge", *folders, "-o", tmp_path / "x.lota")


def test_parents_are_shown_as_a_tree(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = (TaskVector.open(path) for path in pair)
    merge([first, second], "linear", [1.0, 0.5]).save(tmp_path / "both.lota")
    both = TaskVector.open(tmp_path / "both.lota")
    (both - first).save(tmp_path / "minus.lota")
    lines = ok("inspect", tmp_path / "minus.lota").splitlines()
    start = lines.index("parents:")
    assert lines[start + 1 : start + 6] == [
        f"  - both.lota (weight 1.0, merge, linear, {both.digest})",
        f"    - first.lota (weight 1.0, pack, {first.digest})",
        f"    - second.lota (weight 0.5, pack, {second.digest})",
        f"  - first.lota (weight -1.0, pack, {first.digest})",
        "",
    ]


def test_the_overlap_table_fits_a_terminal(pair: tuple[Path, Path]) -> None:
    """No number is cut off at 80 columns, whatever the names."""
    long = pair[0].with_name(f"{'a-rather-long-name-' * 3}.lota")
    pair[0].rename(long)
    master, slave = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-c", MAIN, "inspect", long.name, pair[1].name],
        stdout=slave,
        stderr=subprocess.DEVNULL,
        cwd=long.parent,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"},
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(master)
    assert run.wait() == 0
    lines = shown.decode().replace("\r", "").splitlines()
    table = lines[lines.index("Overlap of the masks") :]
    assert max(map(len, table)) <= 80
    assert "…" not in "".join(table)
    assert any("conflicts" in line and "cosine" in line for line in table)


@pytest.mark.parametrize(
    "command",
    [
        "inspect ''",
        "verify ''",
        "shrink '' --sparsity 0.9 -o x.lota",
        "merge '' -o x.lota",
        "merge --recipe '' -o x.lota",
        "merge a.lota --base '' -o x",
        "arith a.lota --base '' -o x.lota",
        "pack '' . -o x.lota",
        "pack . '' -o x.lota",
        "unpack '' --base . -o x",
        "unpack a.lota --base '' -o x",
        "verify a.lota --base ''",
        "eval '' --data rows.jsonl",
        "eval . --data ''",
        "eval . --data rows.jsonl --with ''",
        "train '' rows.jsonl -o x.lota",
        "train . '' -o x.lota",
        "train . rows.jsonl --config '' -o x.lota",
        "train . rows.jsonl --mask-from '' -o x.lota",
        "train . rows.jsonl --start-from '' -o x.lota",
        "train . rows.jsonl --disjoint-from '' -o x.lota",
        "train . rows.jsonl --eval-data '' -o x.lota",
    ],
)
def test_an_empty_path_is_not_the_current_folder(command: str, llama: Path) -> None:
    done = inside(*shlex.split(command), cwd=llama)
    assert done.returncode == 2
    assert re.search("expected a path( or a Hub id)?, found ''", done.stderr)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval . --data rows.jsonl --batch-size x", "'--batch-size': expected a whole number, found 'x'"),
        ("train . rows.jsonl -o x.lota --steps 1.5", "'--steps': expected a whole number, found '1.5'"),
        ("train . rows.jsonl -o x.lota --l1 much", "'--l1': expected a number, found 'much'"),
        ("train . rows.jsonl -o x.lota --lr fast", "'--lr': expected a number or auto, found 'fast'"),
        ("merge a.lota --lambda one", "'--lambda': expected a number, found 'one'"),
        ("shrink a.lota -o x.lota --sparsity 90%", "'--sparsity': expected a number, found '90%'"),
    ],
)
def test_what_is_not_a_number_is_shown(command: str, message: str) -> None:
    done = inside(*shlex.split(command))
    assert done.returncode == 2
    assert f"Invalid value for {message} " in done.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("inspect first.lota --force", "--force needs --plot: inspect writes no other file"),
        ("eval base --data rows.jsonl --force", "--force needs --answers: eval writes no other file"),
        (
            "eval base --data rows.jsonl --answers x.jsonl",
            "--answers needs --metric exact_match or rouge1: the loss has no answers",
        ),
        (
            "eval base --data rows.jsonl --max-new-tokens 3",
            "--max-new-tokens needs --metric exact_match or --metric rouge1: the loss does not depend on answers",
        ),
        ("pack base first -o x.lota --kind delta", "--kind is one of vector, patch, found 'delta'"),
        ("pack base first -o x.lota --codec zip", "--codec is one of auto, fast, paper64, plain, found 'zip'"),
        (
            "merge first.lota --base base -o x --dtype int4",
            "--dtype is one of float32, bfloat16, float16, found 'int4'",
        ),
        ("shrink first.lota -o x.lota --sparsity 1", "--sparsity must be between 0 and 1, both excluded; found 1.0"),
        (
            "shrink first.lota -o x.lota --sparsity 0.1",
            "first.lota has .* of 16,000 eligible weights; a sparsity of 0.1",
        ),
        ("unpack first.lota --base base -o x.lota", "x.lota: a name that ends in .lota is for a task vector"),
        ("merge first.lota --base base -o x.lota", "x.lota: a name that ends in .lota is for a task vector"),
    ],
)
def test_requests_without_effect_or_sense_are_refused(
    command: str, message: str, pair: tuple[Path, Path], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(llama)
    write_rows(tmp_path / "rows.jsonl")
    assert re.match(f"taskvec: {message}", refused(2, *shlex.split(command)))
    assert not list(tmp_path.glob("x*"))


def test_the_limit_of_a_size_names_its_option(pair: tuple[Path, Path], llama: Path, tmp_path: Path) -> None:
    said = refused(1, "unpack", pair[0], "--base", llama, "-o", tmp_path / "out", "--max-size", "1kB")
    assert said.endswith("the limit is 1,000 bytes unless --max-size allows more\n")


def test_a_sparsity_needs_the_same_tensors(tmp_path: Path) -> None:
    weights = tensor("F32", [1, 2, 3])
    for name, tensors in {
        "base": {"w": weights},
        "more": {"w": weights, "extra": weights},
        "wider": {"w": tensor("F32", [1, 2, 3, 4])},
    }.items():
        write_checkpoint(tmp_path / name, tensors)
    needs = "taskvec: --sparsity needs the same tensors in both models, but tensor "
    for name, sentence in (
        ("more", "'extra' is in more and not in base"),
        ("wider", "'w' is F32 [3] in base and F32 [4]"),
    ):
        said = refused(1, "pack", tmp_path / "base", tmp_path / name, "--sparsity", "0.5", "-o", tmp_path / "x.lota")
        assert said.startswith(needs + sentence)


def test_a_merge_without_unfinished_work_says_so(pair: tuple[Path, Path], llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = inside("merge", *pair, "--base", llama, "-o", out, "--resume")
    assert done.returncode == 0
    assert done.stderr == f"taskvec: note: there is nothing to resume in {out}.part: the merge starts anew\n"
    assert (out / "model.safetensors").exists()


def test_changes_to_nan_are_named_by_pack_and_refused_by_shrink(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"w": tensor("F32", [1, 2, 3, 4])}).path
    tuned = write_checkpoint(tmp_path / "tuned", {"w": tensor("F32", [np.nan, np.inf, 3.5, 5])}).path
    said = ok("pack", base, tuned, "--sparsity", "0.75", "-o", tmp_path / "x.lota")
    assert "not carried: changes of tensor w that are not finite numbers (2)\n" in said
    assert list(TaskVector.open(tmp_path / "x.lota")["w"].indices) == [3]
    # all changes are kept, if they are no more than the entries
    assert "2 replacements" in ok("pack", base, tuned, "--sparsity", "0.5", "-o", tmp_path / "y.lota")
    said = refused(1, "shrink", tmp_path / "y.lota", "--sparsity", "0.75", "-o", tmp_path / "z.lota")
    assert "tensor 'w' has changed weights that are NaN or infinite: they cannot be ranked" in said


@pytest.mark.parametrize(
    "command", ["train", "pack", "unpack", "merge", "arith", "shrink", "inspect", "verify", "eval"]
)
def test_help_is_uniform(command: str) -> None:
    said = ok(command, "--help")
    usage = next(line for line in said.splitlines() if line.strip().startswith("Usage: "))
    assert not re.search("[{}]", usage)
    assert "<list" not in said
    assert "(default" not in said
    options = re.findall(r"^│ [* ]*(--[a-z-]+)", said.partition("─ Options ─")[2].partition("╰")[0], re.MULTILINE)
    last = [option for option in ("--force", "--json", "--help") if option in options]
    assert len(last) > 1
    assert options[-len(last) :] == last


def test_devices_are_described_alike() -> None:
    import typer

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    helps = {next(each.help for each in commands[name].params if each.name == "device") for name in ("train", "eval")}
    assert len(helps) == 1
