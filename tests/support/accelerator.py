"""Training on the accelerators of this machine, beside its CPU. Usage: python -m support.accelerator FOLDER [RUN...].

Each run of `training_processes.RUNS`, or each that is named, is done on the CPU, on one accelerator, and with the model
divided among all accelerators. The first two are compared up to roundings, the last two as runs of one and several
processes. If there is one accelerator, torch's engine divides the model among one process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from support.training_processes import CHECKS, RUNS, alone, close, prepare
from taskvec.errors import TaskvecError

_CPU_ONLY = {"found"}  # compares learning rates by losses that differ by roundings
_LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def divided(folder: Path, output: Path, names: list[str]) -> None:
    """Do runs in this process of several, or of one, whose model torch's engine divides."""
    import taskvec.training.processes as module

    if os.environ["WORLD_SIZE"] == "1":
        module.launched = lambda: 2  # a process by itself does not divide the model
    for name in names:
        if name in CHECKS:
            CHECKS[name](folder)
        else:
            alone(name, folder, output)
    os._exit(0)


def _run(*arguments: object, device: str) -> bool:
    """Do runs in another process. Returns whether they ended."""
    environment = {**os.environ, "TRAINING_DEVICE": device}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        timeout=300,
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        print(done.stderr[-1500:], flush=True)
    return done.returncode == 0


def _equal(one: Path, other: Path, name: str, *, rounded: bool | None) -> bool:
    """Print whether two runs are equal, and return it."""
    label = f"{name}: {one.name} and {other.name}"
    try:
        close(one, other, name, rounded=rounded)
    except (AssertionError, TaskvecError) as error:
        print(f"{label} DIFFER: {' '.join(str(error).split())[:300]}", flush=True)
        return False
    print(f"{label}: equal", flush=True)
    return True


def main() -> None:
    """Do all runs and print how they compare."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        sys.exit("torch finds no accelerator here")
    folder = Path(sys.argv[1])
    names = sys.argv[2:] or [name for name in RUNS if name not in _CPU_ONLY]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prepare(folder / "inputs")
    count = torch.accelerator.device_count()
    single = ("-m", "support.accelerator", "--one", folder / "inputs")
    ended = [
        _run(*single, folder / "cpu", *names, device="cpu"),
        _run(*single, folder / "one", *names, device=device.type),
    ]
    equal = [_equal(folder / "cpu", folder / "one", name, rounded=True) for name in names]
    # one process has no shards to choose
    shards = {name: RUNS[name][1].get("shards") for name in names}
    names = [name for name in names if shards[name] is None or (count > 1 and count % shards[name] == 0)]
    launch = (*_LAUNCH, count, "-m", "support.accelerator", "--divided", folder / "inputs", folder / "divided")
    ended.append(_run(*launch, "loading", *names, device=device.type))
    equal += [_equal(folder / "one", folder / "divided", name, rounded=None) for name in names]
    if not all(ended + equal):
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1] == "--divided":
        divided(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    elif sys.argv[1] == "--one":
        for run in sys.argv[4:]:
            alone(run, Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
