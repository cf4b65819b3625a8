"""Training in several processes gives what one process gives."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import make_llama, write_rows
from support.training_processes import CHECKS, alone, close, prepare
from torch import nn

from taskvec.errors import MaskError, ResumeError, TrainingError, UsageError
from taskvec.models.divided import check_divisible
from taskvec.models.loading import empty_model
from taskvec.training.checkpoints import Piece, load_parts, remove_parts, save_part
from taskvec.training.masking import largest
from taskvec.training.options import TrainingOptions
from taskvec.training.processes import Processes, join
from taskvec.training.request import Request
from taskvec_formats import Form, ModelFolder
from taskvec_formats.dtypes import DTYPES

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


class Threads:
    """Parts of tensors in threads, which exchange arrays as processes do."""

    def __init__(self, shard: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.shard, self._slots, self._barrier = shard, slots, barrier

    def gather_parts(self, value: Any) -> list[Any]:
        self._slots[self.shard] = value
        self._barrier.wait(10)
        found = list(self._slots)
        self._barrier.wait(10)
        return found

    def total(self, counts: Any) -> Any:
        return sum(self.gather_parts(counts))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_parts_select_what_the_whole_selects(data: st.DataObject) -> None:
    """The same entries, also among equal scores, whatever the parts are."""
    count = data.draw(st.integers(1, 4))
    scores = {
        name: np.array(
            data.draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 1e-40]), max_size=12)), np.float32
        )
        for name in ("a", "b", "c")
    }
    forms = {name: Form(DTYPES["F32"], (len(values),)) for name, values in scores.items()}
    changed = sum(int(np.count_nonzero(values)) for values in scores.values())
    if not changed:
        return
    k, scope = data.draw(st.integers(1, changed)), data.draw(st.sampled_from(["global", "tensor"]))
    cuts = {name: sorted(data.draw(st.integers(0, len(v))) for _ in range(count - 1)) for name, v in scores.items()}
    bounds = {name: [0, *cuts[name], len(values)] for name, values in scores.items()}
    try:
        expected: Any = largest(lambda name: scores[name].copy(), forms, k, scope, {})
    except MaskError as error:
        expected = str(error)
    slots, barrier, found = [None] * count, threading.Barrier(count), [None] * count

    def part(shard: int) -> None:
        def own(name: str) -> Any:
            return scores[name][bounds[name][shard] : bounds[name][shard + 1]].copy()

        try:
            masks: Any = largest(own, forms, k, scope, {}, parts=Threads(shard, slots, barrier))
        except MaskError as error:
            masks = str(error)
        found[shard] = masks

    threads = [threading.Thread(target=part, args=(shard,)) for shard in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    if isinstance(expected, str):
        assert found == [expected] * count
        return
    for name in scores:
        joined = np.concatenate([bounds[name][shard] + found[shard][name] for shard in range(count)])  # type: ignore[index]
        assert np.array_equal(joined, expected[name])


def part_of(values: torch.Tensor, first: int, stop: int) -> tuple[list[Piece], torch.optim.Optimizer]:
    """A range of a trained list of numbers, and an optimizer that has taken a step on it."""
    parameter = nn.Parameter(values[first:stop].clone())
    optimizer = torch.optim.Adam([parameter], lr=0.5)
    parameter.grad = values[first:stop] * 2
    optimizer.step()
    return [Piece("list", parameter, first, stop - first, len(values))], optimizer


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_another_number_of_processes_reads_a_checkpoint(data: st.DataObject) -> None:
    values = torch.arange(data.draw(st.integers(1, 9))).float() - 3
    written, read = (
        [0, *sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=3))), len(values)] for _ in range(2)
    )
    with tempfile.TemporaryDirectory() as folder:
        stale = Path(folder) / "part-00000-of-00009.safetensors"
        stale.write_bytes(b"of a run that was killed")
        remove_parts(Path(folder))
        trained, state = [], []
        for shard, (first, stop) in enumerate(pairwise(written)):
            processes = Processes(shard, len(written) - 1)
            processes.shard, processes.shards = shard, len(written) - 1
            pieces, optimizer = part_of(values, first, stop)
            save_part(Path(folder), pieces, optimizer, processes)
            trained.append(pieces[0].parameter.detach())
            state.append(optimizer.state[pieces[0].parameter]["exp_avg_sq"])
        found, held = [], []
        for first, stop in pairwise(read):
            pieces, optimizer = part_of(torch.zeros_like(values), first, stop)
            optimizer.param_groups[0]["lr"] = 7.0
            load_parts(Path(folder), pieces, optimizer)
            found.append(pieces[0].parameter.detach())
            held.append(optimizer.state[pieces[0].parameter]["exp_avg_sq"])
            assert optimizer.state[pieces[0].parameter]["step"] == 1
            assert optimizer.param_groups[0]["lr"] == 0.5
        assert torch.equal(torch.cat(found), torch.cat(trained))
        assert torch.equal(torch.cat(held), torch.cat(state))
        first_file = min(Path(folder).iterdir())
        first_file.rename(Path(folder) / "elsewhere")
        pieces, optimizer = part_of(values, 0, len(values))
        if written[1] or len(written) == 2:
            with pytest.raises(ResumeError, match=r"lacks|without values"):
                load_parts(Path(folder), pieces, optimizer)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    prepare(folder)
    return folder


def launch(count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a module in several processes, started by torchrun."""
    paths = [str(ROOT / "tests"), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [*TORCHRUN, str(count), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "names"),
    [
        (
            2,
            "loading inputs adamw rmsprop-bf16 low-memory fisher lotto via fft recomputed replicas best mask switch "
            "gallop principal low-magnitude regrowing adamw-bf16 gradient random",
        ),
        (4, "low-memory-bf16 divided-replicas taken t5 uneven saliency lift"),
    ],
)
def test_several_processes_train_what_one_trains(inputs: Path, tmp_path: Path, count: int, names: str) -> None:
    runs = [name for name in names.split() if name not in CHECKS]
    for name in runs:
        alone(name, inputs, tmp_path / "one")
    done = launch(count, "-m", "support.training_processes", inputs, tmp_path / "several", *names.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == count
    for name in runs:
        close(tmp_path / "one", tmp_path / "several", name)
    for name in {"mask", "lift", "principal", "low-magnitude"}.intersection(runs):  # all values are zero
        files = [(tmp_path / folder / f"{name}.lota").read_bytes() for folder in ("one", "several")]
        assert files[0] == files[1], name


ARGUMENTS = "--sparsity 0.9 --calibration-steps 2 --batch-size 5 --device cpu --lr 1e-3 --optimizer adam --json".split()


@pytest.fixture
def request_(tmp_path: Path) -> list[str]:
    base, data = make_llama(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", [{"text": "one two three"}] * 9)
    return ["-m", "taskvec_cli", "train", str(base), str(data), *ARGUMENTS]


def said(errors: str) -> list[str]:
    """The messages of the command, among those of torchrun."""
    return [line for line in errors.splitlines() if line.startswith("taskvec: ")]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
def test_a_killed_process_ends_the_run_and_another_number_of_processes_resumes_it(
    request_: list[str], tmp_path: Path
) -> None:
    request = [*request_, "--steps", "60", "--save-steps", "4"]
    output = tmp_path / "task.lota"
    command = [*TORCHRUN, "2", *request, "-o", str(output)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as job:
        while not list((tmp_path / "task.lota.run").glob("checkpoints/*/complete")):
            assert job.poll() is None
            time.sleep(0.01)
        workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 1
    assert not output.exists()
    (message,) = said(errors)
    assert re.search("another of the 2 processes has ended; the last checkpoint is|stopped after|terminated", message)
    resumed = subprocess.run(
        [sys.executable, *request, "-o", str(output), "--resume"], capture_output=True, text=True, check=True
    )
    once = [sys.executable, *request, "-o", str(tmp_path / "once.lota")]
    expected = subprocess.run(once, capture_output=True, text=True, check=True)
    report, other = json.loads(resumed.stdout), json.loads(expected.stdout)
    assert report["final_loss"] == pytest.approx(other["final_loss"], rel=1e-6)
    assert report["steps"] == other["steps"] == 60


@pytest.mark.slow
def test_what_one_process_lacks_is_said_once(request_: list[str], tmp_path: Path) -> None:
    script = tmp_path / "each.py"
    script.write_text(
        "import os, sys\n"
        "sys.argv[1:] = [word.replace('RANK', os.environ['RANK']) for word in sys.argv[1:]]\n"
        "from taskvec_cli.main import main\n"
        "main()\n"
    )
    base, data, *words = request_[3:]
    Path(base).rename(tmp_path / "base0")
    words += ["-o", str(tmp_path / "task.lota"), "--steps", "2"]
    done = launch(2, script, "train", f"{tmp_path}/baseRANK", data, *words)
    assert done.returncode == 1
    assert said(done.stderr) == [f"taskvec: process 1 of 2: {tmp_path}/base1: no such file or folder"]
    assert not (tmp_path / "task.lota").exists()
    assert not (tmp_path / "task.lota.run").exists()


@pytest.mark.parametrize(
    ("changed", "folder", "message"),
    [
        ({"method": "lora", "sparsity": None}, "run", "`method=lora` trains in one process"),
        ({"batch_size": 1}, "run", "`batch_size` counts the examples of all 2 processes, so it must be at least 2"),
        ({"regrow_steps": 5}, "run", "the processes divide its rows: use `shards=1`"),
        ({}, None, "2 processes need `folder`, a folder that all of them can read and write"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    changed: dict[str, Any], folder: str | None, message: str, llama: Path, tmp_path: Path
) -> None:
    request = Request(ModelFolder(llama), tmp_path / "rows.jsonl", TrainingOptions(**changed))
    processes = Processes(0, 2)
    processes.shards = 2
    with pytest.raises(UsageError, match=message):
        request.check_processes(processes, None if folder is None else tmp_path / folder)


def test_models_that_skip_blocks_at_random_are_refused(llama: Path) -> None:
    model, _ = empty_model(llama, torch.float32)
    check_divisible(model, llama)
    model.config.layerdrop = 0.1
    with pytest.raises(TrainingError, match="skips blocks at random \\(layerdrop in its config\\), which several"):
        check_divisible(model, llama)


def test_one_process_refuses_shards(llama: Path, tmp_path: Path) -> None:
    request = Request(ModelFolder(llama), tmp_path / "rows.jsonl", TrainingOptions(shards=2))
    with pytest.raises(UsageError, match="`shards` has no effect in one process"):
        request.check_processes(Processes(), tmp_path)


@pytest.mark.parametrize(
    ("variables", "options", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "accelerate is configured for DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "accelerate is configured for FSDP 1"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "accelerate is configured for bf16, but `dtype=float32`"),
        ({}, {"device": "cuda:1"}, "`device=cuda:1` is one device, but there are 2 processes"),
    ],
)
def test_settings_of_launchers_that_would_have_no_effect_are_refused(
    variables: dict[str, str], options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        join(TrainingOptions(**options))
