"""Computes the tables of the paper.

Usage: python -m paper WORLD FOLDER RESULTS [TABLE ...] [--tasks FOLDER] [--task NAME=TRAIN,TEST] [--quick]

WORLD is small, smollm2 or smollm2-long, which needs an accelerator. FOLDER keeps the base, the data and the vectors.
RESULTS is the file of the results, one JSON line per cell; cells that it contains are not computed again. The tables
and plots are made from it by `paper.report` and `paper.plots`.

The real tasks of SmolLM2 are in the folder of --tasks, as NAME/train.jsonl and NAME/test.jsonl with the columns prompt
and completion, or each is given by --task as two files, folders or Hub ids.
"""

from __future__ import annotations

import argparse
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import active_children, get_context
from pathlib import Path
from platform import machine, python_version

import torch

from taskvec.data.sources import data_path
from taskvec.devices import device_of
from taskvec.hub import open_checkpoint

from . import tables, workers
from .store import Store, StoreError
from .worlds import WORLDS, Place, TaskError


def main() -> int:
    """Compute the missing cells of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("tables", nargs="*")
    parser.add_argument("--tasks", type=Path, help="folder with NAME/train.jsonl and NAME/test.jsonl of real tasks")
    parser.add_argument("--task", action="append", default=[], metavar="NAME=TRAIN,TEST", help="one real task")
    parser.add_argument("--quick", action="store_true", help="fewer cases, rows and seeds")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_intermixed_args()
    world = tables.sized(WORLDS[given.world], quick=given.quick)
    place = Place(world, given.folder.absolute(), _tasks(given.tasks, given.task))
    rows = [row for name in given.tables or tables.names() for row in tables.read(name, world, quick=given.quick).rows]
    store = Store(given.results)
    try:
        place.check({task for row in rows for task in row.report})
        place.prepare()
        head = store.begin(_head(place))
    except (StoreError, TaskError) as fault:
        sys.exit(str(fault))
    failed = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the workers too
    # a fresh process per worker: torch's threads do not survive a fork
    pool = ProcessPoolExecutor(given.workers, get_context("spawn"), workers.set_up, (place, given.results, head))
    try:
        for done, (row, error) in enumerate(zip(rows, pool.map(workers.compute, rows), strict=True), 1):
            failed += error is not None
            print(f"{done}/{len(rows)} {row.table}: {row.name} {error or ''}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        for process in active_children():
            process.kill()
        sys.exit("interrupted: the same command computes the rest")
    finally:
        pool.shutdown(cancel_futures=True)
    return 1 if failed else 0


def _tasks(folder: Path | None, given: list[str]) -> dict[str, tuple[Path, Path]]:
    """Real tasks by name, from a folder of them and from the option --task."""
    found = {}
    if folder is not None:
        if not folder.is_dir():
            sys.exit(f"--tasks: {folder} is not a folder")
        for path in sorted(folder.iterdir()):
            files = path / "train.jsonl", path / "test.jsonl"
            if all(file.exists() for file in files):
                found[path.name] = files
    for text in given:
        name, _, sources = text.partition("=")
        train, comma, test = sources.partition(",")
        if not (name and train and comma and test):
            sys.exit(f"--task: expected NAME=TRAIN,TEST, found {text!r}")
        found[name] = data_path(train), data_path(test)
    return found


def _head(place: Place) -> dict[str, object]:
    device, accelerator = device_of("auto"), {}
    if device.type != "cpu":
        accelerator = {
            "device": torch.get_device_module(device).get_device_name(device),
            "matmul_precision": workers.MATMUL_PRECISION,
        }
    packages = ("taskvec", "torch", "transformers", "numpy")
    return {
        "base": open_checkpoint(place.base).fingerprint,
        "base_bytes": sum(file.stat().st_size for file in place.base.glob("*.safetensors")),
        "world": place.world.name,
        "machine": machine(),
        **accelerator,
        "versions": {"python": python_version(), **{name: version(name) for name in packages}},
    }


if __name__ == "__main__":
    sys.exit(main())
