"""Size, time and memory of `.lota` files compared with other layouts, on real pairs of checkpoints.

Usage: python benchmarks/format.py FOLDER. FOLDER is the folder that `benchmarks/pairs.py` made.
Every figure is of whole processes and whole files, the better of two runs. After each round trip the result is compared
with the tuned tensors. Peers that are not installed are left out and listed.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from entropy import report
from pairs import PAIRS
from processes import measure

from taskvec_formats import ModelFolder
from taskvec_formats.file_names import SINGLE

PEERS = ("coo", "coo-torch", "gaps", "xor", "zipnn", "weightscope", "reminis")
TOOLS = ("zipnn", "weightscope", "reminis")
HEAD = ("pair", "changed", "layout", "bits per changed weight", "pack s", "peak MB", "unpack s", "peak MB")
RUNS = 2


def program(name: str) -> str:
    """The path of a command that is installed next to this Python."""
    return str(Path(sys.executable).with_name(name))


def commands(layout: str, base: Path, tuned: Path, work: Path) -> tuple[list[str], list[str], Path, Path]:
    """The commands that pack and unpack a pair in a layout.

    Args:
        layout: The layout.
        base: The base.
        tuned: The tuned model.
        work: The folder to write to.

    Returns:
        The command that packs, the command that unpacks, the packed file, and the path of the unpacked model.
    """
    packed, out = work / "packed.lota", work / SINGLE
    match layout:
        case "vector" | "patch" | "paper64":
            choice = ["--codec", layout] if layout == "paper64" else ["--kind", layout]
            pack = [program("taskvec"), "pack", str(base), str(tuned), "-o", str(packed), *choice, "--force"]
            out = work / "out"
            unpack = [program("taskvec"), "unpack", str(packed), "--base", str(base), "-o", str(out), "--force"]
        case "weightscope":
            packed = work / "packed.wsp"
            pack = [program(layout), "export", str(base), str(tuned), "-o", str(packed), "--threshold", "0"]
            unpack = [program(layout), "apply", str(packed), str(base), "-o", str(out)]
        case "reminis":
            # it reads and writes databases only; the conversion to them is not included in its times
            packed, out = work / "packed.db", work / "out.db"
            for model, database in ((base, "base.db"), (tuned, "tuned.db")):
                measure([program(layout), "convert", "-q", str(model / SINGLE), "-o", str(work / database)])
            pack = [program(layout), "diff", "-q", str(work / "base.db"), str(work / "tuned.db"), "-o", str(packed)]
            unpack = [program(layout), "apply", "-q", str(work / "base.db"), str(packed), "-o", str(out)]
        case _:
            peer = [sys.executable, str(Path(__file__).with_name("peers.py")), layout]
            pack = [*peer, "pack", str(base / SINGLE), str(tuned / SINGLE), str(packed)]
            unpack = [*peer, "unpack", str(packed), str(base / SINGLE), str(out)]
    return pack, unpack, packed, out


def exported(layout: str, out: Path) -> Path:
    """Convert the result of a layout to safetensors, if it is not."""
    if layout != "reminis":
        return out
    result = out.with_name(SINGLE)
    measure([program(layout), "export", "-q", str(out), "-o", str(result)])
    return result


def best(command: list[str]) -> tuple[float, float]:
    """The shortest time of a command in seconds, and the peak memory of that run in MB."""
    return min(measure(command) for _ in range(RUNS))


def count_changed(base: Path, tuned: Path) -> int:
    """The number of elements whose bits differ."""
    before, after = ModelFolder(base), ModelFolder(tuned)
    return sum(int(np.count_nonzero(before.bits(name) != after.bits(name))) for name in before.tensors)


def same(a: Path, b: Path) -> bool:
    """Whether two checkpoints have the same tensors, bit for bit."""
    return ModelFolder(a).digests() == ModelFolder(b).digests()


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own.

    The reported peak memory of a child process is never below the memory of its parent, so this one must stay small.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main(folder: Path) -> None:
    """Print the tables."""
    missing = [tool for tool in TOOLS if find_spec(tool) is None]
    if missing:
        print(f"not installed, left out: {', '.join(missing)}\n")
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    streams = []
    for pair, (base, tuned) in PAIRS.items():
        changed = apart(count_changed, folder / base, folder / tuned)
        ours, more = ("patch", ()) if pair.startswith("bf16") else ("vector", ("paper64",))
        for layout in (ours, *more, *(peer for peer in PEERS if peer not in missing)):
            work = folder / "bench-work"
            work.mkdir()
            try:
                pack, unpack, packed, out = commands(layout, folder / base, folder / tuned, work)
                times = [*best(pack), *best(unpack)]
                bits = 8 * packed.stat().st_size / changed
                faithful = apart(same, exported(layout, out), folder / tuned)
                if layout == ours:
                    if not faithful:
                        sys.exit(f"{layout} did not give {tuned} back")
                    streams.append((pair, apart(report, packed, folder / base, folder / tuned)))
            finally:
                shutil.rmtree(work)
            name = f"`.lota` {layout}" if layout in (ours, *more) else layout
            name += "" if faithful else " (not exact)"
            figures = f"{bits:.1f} | {times[0]:.1f} | {times[1]:.0f} | {times[2]:.1f} | {times[3]:.0f}"
            print(f"| {pair} | {changed:,} | {name} | {figures} |", flush=True)
    copy, shard = folder / "copy", str(folder / "base32" / SINGLE)
    seconds = [best(["cp", shard, str(copy)])[0], best(["sha256sum", shard])[0]]
    copy.unlink()
    print(f"\nOf the f32 checkpoint, cp takes {seconds[0]:.1f} s and sha256sum {seconds[1]:.1f} s.")
    print("\nBits per changed weight in the `.lota` files, and the empirical entropies of the same data:\n")
    print("| pair | " + " | ".join(streams[0][1]) + " |\n" + "|---" * (1 + len(streams[0][1])) + "|")
    for pair, row in streams:
        print(f"| {pair} | " + " | ".join(f"{bits:.2f}" for bits in row.values()) + " |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
