"""Checks that no setting of the results was chosen on a test part.

Usage: python -m paper.check WORLD RESULTS [FOLDER] [--quick]

Every score on a test part must belong to the setting that the validation scores alone choose, and no other setting may
have one. With FOLDER, where the run has its data, no prompt may be in two parts of a task.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import tables
from .scores import MissingError, Results
from .selection import cell_of
from .store import Store
from .tables import sized
from .worlds import WORLDS, World


def chosen_on_tests(world: World, store: Store, *, quick: bool = False) -> list[str]:
    """One sentence per score on a test part whose setting is not the one that validation chooses.

    Args:
        world: The world.
        store: Its results.
        quick: Whether they are those of a quick run.
    """
    results, known, faults = Results(world, store), {cell_of(None, None, 0)}, []
    for name in tables.names():
        for row in tables.read(name, world, quick=quick).rows:
            try:
                setting = results.choice(row.spec)
            except MissingError:
                continue
            known |= {cell_of(row.spec, setting, seed) for seed in world.seeds}
    for cell, task in store.tests:
        if cell not in known:
            faults.append(f"{cell[0]} with {cell[1]}, seed {cell[2]}, has a test score on {task} but was not chosen")
    return faults


def shared_prompts(folder: Path) -> list[str]:
    """One sentence per pair of files of a task that have prompts in common: training, validation or test parts."""
    faults = []
    parts: dict[str, dict[str, set[str]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        task, _, part = path.stem.partition("-")
        rows = path.read_text(encoding="utf-8").rstrip("\n").split("\n")  # a text may contain other line separators
        parts.setdefault(task, {})[part] = {json.loads(row)["prompt"] for row in rows}
    for task, files in parts.items():
        for held in ("validation", "test"):
            for part, prompts in files.items():
                if held in files and part != held and (shared := files[held] & prompts):
                    faults.append(f"{task}: {len(shared)} prompts are both in {held} and in {part}")
    return faults


def main() -> int:
    """Print the faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_intermixed_args()
    store = Store(given.results)
    faults = chosen_on_tests(sized(WORLDS[given.world], quick=given.quick), store, quick=given.quick)
    if given.folder is not None:
        faults += shared_prompts(given.folder / "data")
    print("\n".join(faults) or f"{len(store.tests)} scores on test parts: all have the setting that validation chooses")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
