"""Size, time and memory of `.lota` files beside other layouts, on real pairs, in one run.

Usage: python benchmarks/format.py FOLDER. FOLDER is what `benchmarks/pairs.py` made.
Every figure is of whole processes and whole files. After each round trip the result is compared with the tuned tensors.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from pairs import PAIRS
from peers import LAYOUTS
from processes import measure

from taskvec_formats import Checkpoint
from taskvec_formats.checkpoint import SINGLE

HEAD = ("pair", "changed", "layout", "bits a changed weight", "pack s", "peak MB", "unpack s", "peak MB")


def commands(layout: str, base: Path, tuned: Path, work: Path) -> tuple[list[str], list[str], Path, Path]:
    """The commands that pack and unpack a pair, the packed file, and where the model comes out."""
    packed, out = work / f"packed.{layout}", work / "out"
    if layout == "lota":
        taskvec = str(Path(sys.executable).with_name("taskvec"))
        return (
            [taskvec, "pack", str(base), str(tuned), "-o", str(packed)],
            [taskvec, "unpack", str(packed), "--base", str(base), "-o", str(out)],
            packed,
            out,
        )
    peer = [sys.executable, str(Path(__file__).with_name("peers.py")), layout]
    out = work / SINGLE
    return (
        [*peer, "pack", str(base / SINGLE), str(tuned / SINGLE), str(packed)],
        [*peer, "unpack", str(packed), str(base / SINGLE), str(out)],
        packed,
        out,
    )


def count_changed(base: Path, tuned: Path) -> int:
    """Elements whose bits differ."""
    before, after = Checkpoint(base), Checkpoint(tuned)
    return sum(int(np.count_nonzero(before.bits(name) != after.bits(name))) for name in before.tensors)


def same(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    return Checkpoint(a).digests() == Checkpoint(b).digests()


def apart(function: Callable[[Path, Path], Any], a: Path, b: Path) -> Any:
    """Call in a process of its own: a child's peak memory is never reported below what its parent held."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, a, b).result()


def main(folder: Path) -> None:
    """Print the table."""
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for pair, (base, tuned) in PAIRS.items():
        changed = apart(count_changed, folder / base, folder / tuned)
        for layout in ("lota", *LAYOUTS):
            work = folder / "bench-work"
            work.mkdir()
            try:
                pack, unpack, packed, out = commands(layout, folder / base, folder / tuned, work)
                times = [*measure(pack), *measure(unpack)]
                bits = 8 * packed.stat().st_size / changed
                if not apart(same, out, folder / tuned):
                    sys.exit(f"{layout} did not give {tuned} back")
            finally:
                shutil.rmtree(work)
            figures = f"{bits:.1f} | {times[0]:.1f} | {times[1]:.0f} | {times[2]:.1f} | {times[3]:.0f}"
            print(f"| {pair} | {changed:,} | {layout} | {figures} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
