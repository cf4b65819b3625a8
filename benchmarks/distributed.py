"""Memory and time of training in one and in several processes, on one machine.

Usage: python benchmarks/distributed.py BASE FOLDER. FOLDER is emptied at the end.

The model is trained for a few steps with `taskvec.train`, in f32 with RMSprop, and the rows are the same for any number
of processes. Columns: processes; among how many of them the weights are divided; peak resident memory of the process
that needs most; and seconds per step of calibration and of training, the median without the first step.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

STEPS, BATCH = 5, 4
RUNS = ((1, None), (2, None), (2, 1), (4, None))  # processes, shards
COLUMNS = ("processes", "shards", "peak MB a process", "calibration s/step", "training s/step")


def write_rows(path: Path) -> None:
    """Write examples of about 64 tokens."""
    rows = [
        {"prompt": " + ".join(str(7 * n % (k + 5)) for k in range(12)), "completion": str(n)}
        for n in range(STEPS * BATCH)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def peak() -> int:
    """Peak resident memory of this process, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) // 1000 for line in lines if line.startswith("VmHWM"))


def work(base: Path, folder: Path, shards: int | None) -> None:
    """Train in this process, together with others if there are some, and print a row as JSON."""
    from taskvec import train

    times: dict[str, list[float]] = {"calibrating": [], "training": []}
    every = json.loads(os.environ.get("RANK", "0")) == 0

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if note and stage in times:
            times[stage].append(time.perf_counter())

    train(
        base,
        folder / "rows.jsonl",
        folder=folder / "run",
        progress=progress,
        sparsity=0.9,
        calibration_steps=STEPS,
        steps=STEPS,
        batch_size=BATCH,
        device="cpu",
        shards=shards,
    )
    from taskvec.training.processes import joined

    processes = joined()
    peaks = [peak()] if processes is None else processes.gather(peak())
    if every:
        steps = [statistics.median(b - a for a, b in pairwise(each)) for each in times.values()]
        print(json.dumps({"peak": max(peaks), "steps": steps}), flush=True)
    os._exit(0)  # a process group of gloo sometimes aborts when it is destroyed


def launch(base: Path, folder: Path, count: int, shards: int | None) -> dict[str, Any]:
    """Train in some processes, and return what the first one prints."""
    command = [sys.executable]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += [__file__, str(base), str(folder), str(shards or 0)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    shutil.rmtree(folder / "run")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    base, folder = Path(sys.argv[1]), Path(sys.argv[2])
    if len(sys.argv) > 3:
        work(base, folder, int(sys.argv[3]) or None)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_rows(folder / "rows.jsonl")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for count, shards in RUNS:
        found = launch(base, folder, count, shards)
        calibration, training = found["steps"]
        cells = [count, shards or count, f"{found['peak']:,}", f"{calibration:.2f}", f"{training:.2f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
