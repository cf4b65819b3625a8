"""Commands that are killed or run out of disk space: they leave the old output, no output, or the complete new one."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from support.building import package, tensor, write_checkpoint
from support.models import make_llama, write_rows

from taskvec import diff
from taskvec_formats import LotaReader, ModelFolder

pytestmark = pytest.mark.slow

TASKVEC = [sys.executable, "-c", "from taskvec_cli.main import main; main()"]
# processes started in the background ignore SIGINT; this program handles it even if the tests run there
FOREGROUND = [*TASKVEC[:2], f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {TASKVEC[2]}"]
KILLS = 4  # per command, with and without an output to replace


class Case(NamedTuple):
    """A command and its outputs.

    Attributes:
        command: The arguments, except for the path of the output.
        old: An output of an earlier command.
        new: The output that the command writes if nothing interrupts it.
    """

    command: list[str]
    old: Path
    new: Path


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Models of a few megabytes in several tensors and shards, with two fine-tunes: an old and a new output."""
    folder = tmp_path_factory.mktemp("crash")
    rng = np.random.default_rng(0)
    weights = {f"layers.{i}.weight": rng.normal(size=(500, 400)) * 0.02 for i in range(8)}
    states = {"base": 0.0, "old": 1e-3, "new": 2e-3}
    for name, scale in states.items():
        tensors = {n: tensor("BF16", w + scale * rng.normal(size=w.shape)) for n, w in weights.items()}
        write_checkpoint(folder / name, tensors, 3, {"config.json": name.encode()})
    for name in ("old", "new"):
        diff(ModelFolder(folder / "base"), ModelFolder(folder / name)).save(folder / f"{name}.lota")
        LotaReader(folder / f"{name}.lota").verify()
    pack = ["pack", str(folder / "base"), str(folder / "new"), "-o"]
    unpack = ["unpack", str(folder / "new.lota"), "--base", str(folder / "base"), "-o"]
    return {
        "pack": Case(pack, folder / "old.lota", folder / "new.lota"),
        "unpack": Case(unpack, folder / "old", folder / "new"),
    }


def run(*arguments: object) -> None:
    """Run a command to its end."""
    subprocess.run([*TASKVEC, *map(str, arguments)], check=True, capture_output=True)


def content(path: Path) -> object:
    """Return the content of a file or folder, comparable with ==."""
    return package(path) if path.is_dir() else path.read_bytes()


def put(old: Path, path: Path) -> None:
    """Copy an earlier output to a path."""
    if old.is_dir():
        shutil.copytree(old, path)
    else:
        shutil.copyfile(old, path)


@pytest.mark.parametrize("force", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("name", ["pack", "unpack"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(
    name: str, force: bool, cases: dict[str, Case], tmp_path: Path
) -> None:
    case = cases[name]
    old, new = content(case.old), content(case.new)
    assert old != new
    begun = time.monotonic()
    run(*case.command, tmp_path / "alone")
    length = time.monotonic() - begun
    assert content(tmp_path / "alone") == new

    dice = random.Random(f"{name} {force}")
    for kill in range(KILLS):
        folder = tmp_path / str(kill)
        folder.mkdir()
        out = folder / "out"
        if force:
            put(case.old, out)
        command = [*TASKVEC, *case.command, str(out), *(["--force"] if force else [])]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            # one random moment in each part of the duration, so that the moments are spread out
            time.sleep(length * (kill + dice.random()) / KILLS)
            process.kill()
            assert process.communicate()[1] == b"", "the command failed before it was killed"
        if out.exists():
            assert content(out) in ((old, new) if force else (new,))
        else:
            # other systems cannot replace a folder in one step: the old one is moved away first
            assert not force or sys.platform != "linux"
    # the remains of a killed run do not disturb later runs
    run(*case.command, out, "--force")
    assert content(out) == new


FULL = "limit = {limit}; " + (
    "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
    "from taskvec_cli.main import main; main()"
)


@pytest.mark.parametrize(
    ("share", "force"), [(0.0, False), (0.5, True), (1.0, False)], ids=["at once", "half-way", "at the last byte"]
)
@pytest.mark.parametrize("name", ["pack", "unpack"])
def test_a_write_that_fails_is_said_and_leaves_nothing(
    name: str, share: float, force: bool, cases: dict[str, Case], tmp_path: Path
) -> None:
    """A limit on the file size takes the place of a full disk."""
    case, out = cases[name], tmp_path / "out"
    if force:
        put(case.old, out)
    before = {path.name: content(path) for path in tmp_path.iterdir()}
    files = [case.new] if case.new.is_file() else list(case.new.iterdir())
    limit = max(1, int(share * max(path.stat().st_size for path in files)) - 1)
    command = [sys.executable, "-c", FULL.format(limit=limit), *case.command, str(out), *(["--force"] if force else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"taskvec: {out}: File too large\n"
    assert {path.name: content(path) for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("share", [0.1, 0.9])
@pytest.mark.parametrize("name", ["pack", "unpack"])
def test_a_full_disk_is_said_and_left_empty(name: str, share: float, cases: dict[str, Case], tmp_path: Path) -> None:
    """The output goes to a file system smaller than itself, mounted in a namespace that ends with the process."""
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount -t tmpfs -o size="$1" tmpfs "$2"'
    if (
        shutil.which("unshare") is None
        or subprocess.run([*inside, mount, "sh", "64k", str(tmp_path)], capture_output=True, check=False).returncode
    ):
        pytest.skip("no file system can be mounted here")
    case = cases[name]
    files = [case.new] if case.new.is_file() else list(case.new.iterdir())
    size = int(share * sum(path.stat().st_size for path in files))
    script = mount + ' && folder="$2" && shift 2 && { "$@"; echo "code $?"; ls -A "$folder"; }'
    arguments = [str(size), str(tmp_path), *TASKVEC, *case.command, str(tmp_path / "out")]
    done = subprocess.run([*inside, script, "sh", *arguments], capture_output=True, text=True, check=False)
    assert done.stdout == "code 1\n"
    # the size of a folder is checked before it is written
    said = {"pack": ": No space left on device", "unpack": r" needs [\d,]+ bytes, but only [\d,]+ are free in .*"}[name]
    assert re.fullmatch(re.escape(f"taskvec: {tmp_path / 'out'}") + said + "\n", done.stderr)


# a command that sends itself a signal when it reports a step
INTERRUPTED = """
import os, signal, sys
from contextlib import contextmanager
from taskvec.reporting import bars

@contextmanager
def interrupting():
    yield lambda stage, done, *_: (stage, done) == ("{stage}", 3) and os.kill(os.getpid(), {number})

bars.progress_bars = interrupting
signal.signal(signal.SIGINT, signal.default_int_handler)
from taskvec_cli.main import main
main()
"""


@pytest.mark.parametrize(
    ("how", "sentence"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")], ids=["SIGINT", "SIGTERM"]
)
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("pack", "packing"),
        ("pack --sparsity", "hashing tuned"),
        ("pack --sparsity", "writing"),
        ("unpack", "applying"),
        ("merge", "applying"),
    ],
)
def test_a_signal_is_answered_by_one_sentence_and_leaves_no_temporary_files(
    name: str, stage: str, how: signal.Signals, sentence: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    vector, base = cases["pack"].new, cases["unpack"].command[3]
    merge = ["merge", str(vector), "--base", base, "--shard-size", "1MB", "-o"]
    sparse = [*cases["pack"].command[:-1], "--sparsity", "0.5", "-o"]
    command = {"merge": merge, "pack --sparsity": sparse}.get(name) or cases[name].command
    program = INTERRUPTED.format(stage=stage, number=int(how))
    done = subprocess.run(
        [sys.executable, "-c", program, *command, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (128 + how, "")
    if name == "merge":  # the finished shards
        assert done.stderr == f"taskvec: {sentence}; --resume continues\n"
        assert [path.name for path in tmp_path.iterdir()] == ["out.part"]
    else:
        assert done.stderr == f"taskvec: {sentence}\n"
        assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], bytes]:
    """A command that trains, without its output, and the file that it writes."""
    folder = tmp_path_factory.mktemp("training")
    base, data = make_llama(folder / "base"), write_rows(folder / "rows.jsonl")
    recipe = "--calibration-steps 2 --steps 50 --save-steps 1 --batch-size 2 --lr 1e-3 --device cpu".split()
    train = ["train", str(base), str(data), *recipe]
    run(*train, "-o", folder / "whole.lota")
    assert {path.name for path in folder.iterdir()} == {"base", "rows.jsonl", "whole.lota"}
    return train, (folder / "whole.lota").read_bytes()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_to_the_same_file(
    how: signal.Signals, training: tuple[list[str], bytes], tmp_path: Path
) -> None:
    train, whole = training
    output, folder = tmp_path / "x.lota", tmp_path / "x.lota.run"
    process = subprocess.Popen([*TASKVEC, *train, "-o", str(output)], stderr=subprocess.PIPE, text=True)
    while len(list(folder.glob("checkpoints/*/complete"))) < 1:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(how)
    said = process.communicate()[1]
    if how == signal.SIGKILL:
        assert process.returncode == -how
    else:
        assert process.returncode == 128 + how
        step = re.fullmatch(
            r"taskvec: stopped after step (\d+) of 50 of training; --resume continues from there",
            said.splitlines()[-1],
        )
        assert step, said
        assert (folder / "checkpoints" / f"checkpoint-{step[1]}" / "complete").exists()
    assert not output.exists()
    again = subprocess.run([*TASKVEC, *train, "-o", str(output)], check=False, capture_output=True, text=True)
    assert again.returncode == 2
    assert "x.lota.run contains an unfinished run: --resume continues it, --force starts over" in again.stderr

    run(*train, "-o", output, "--resume")
    assert output.read_bytes() == whole
    assert not folder.exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_merge_that_was_stopped_goes_on_to_the_same_folder(how: signal.Signals, tmp_path: Path) -> None:
    # many shards of one tensor each, so that the merge can be stopped between two of them; each shard is synced
    dice, names = np.random.default_rng(0), ["base", "a", "b"]
    for name in names:
        weights = {f"layers.{i}.weight": tensor("F32", dice.normal(size=(20, 20))) for i in range(160)}
        write_checkpoint(tmp_path / name, weights, 1, {"config.json": b"{}"})
    for name in names[1:]:
        diff(ModelFolder(tmp_path / "base"), ModelFolder(tmp_path / name)).save(tmp_path / f"{name}.lota")
    vectors = [str(tmp_path / f"{name}.lota") for name in names[1:]]
    merge = ["merge", *vectors, "--base", str(tmp_path / "base"), "--shard-size", "1KB", "--method", "linear"]
    run(*merge, "-o", tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 160

    output, part = tmp_path / "model", tmp_path / "model.part"
    with subprocess.Popen([*FOREGROUND, *merge, "-o", str(output)], stdout=subprocess.DEVNULL) as process:
        while not list(part.glob("model-*.safetensors")):
            assert process.poll() is None, "the command ended before it was stopped"
        process.send_signal(how)
        assert process.wait() != 0
    assert not output.exists()
    finished = {path.name: path.stat().st_mtime_ns for path in part.glob("model-*.safetensors")}
    assert 0 < len(finished) < 160
    again = subprocess.run([*TASKVEC, *merge, "-o", str(output)], check=False, capture_output=True, text=True)
    assert again.returncode == 2
    assert "model.part contains an unfinished merge: --resume continues it, --force starts over" in again.stderr
    other = [*TASKVEC, *merge, "--weights", "1,2", "-o", str(output), "--resume"]
    refused = subprocess.run(other, check=False, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "model.part belongs to another merge: weights is [1.0, 1.0] there, but [1.0, 2.0] here" in refused.stderr

    run(*merge, "-o", output, "--resume")
    # the model card contains the name of the folder
    (output / "README.md").write_text((output / "README.md").read_text().replace("# model\n", "# whole\n"))
    assert package(output) == package(tmp_path / "whole")
    assert {name: (output / name).stat().st_mtime_ns for name in finished} == finished
    assert not part.exists()
