"""Time and peak memory of the everyday commands as whole processes, relative to copying and hashing the checkpoint.

Usage: python benchmarks/everyday.py DEMO_FOLDER [RUNS]. DEMO_FOLDER is the folder that `taskvec demo` made.
Figures are medians over RUNS runs.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from processes import measure

COLUMNS = ("command", "seconds", "÷ cp + sha256sum", "peak MB")


def main(folder: Path, runs: int) -> None:
    """Run every command in turn, `runs` times, and print the table."""
    taskvec = str(Path(sys.executable).with_name("taskvec"))
    base, tuned, work = folder / "base", folder / "merged", Path(tempfile.mkdtemp(prefix="bench-", dir=folder))
    sql, maths = folder / "sql.lota", folder / "maths.lota"
    shard = base / "model.safetensors"
    commands = {
        "cp": ["cp", str(shard), str(work / "copy")],
        "sha256sum": ["sha256sum", str(shard)],
        "taskvec --help": [taskvec, "--help"],
        "pack": [taskvec, "pack", str(base), str(tuned), "-o", str(work / "x.lota"), "--force"],
        "unpack": [taskvec, "unpack", str(sql), "--base", str(base), "-o", str(work / "out"), "--force"],
        "merge": [taskvec, "merge", str(sql), str(maths), "-o", str(work / "m.lota"), "--force"],
        "merge --base": [taskvec, "merge", str(sql), str(maths), "--base", str(base), "-o", str(work / "m"), "--force"],
        "inspect, one": [taskvec, "inspect", str(sql)],
        "inspect, two": [taskvec, "inspect", str(sql), str(maths)],
        "verify --base": [taskvec, "verify", str(sql), "--base", str(base)],
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    try:
        for _ in range(runs):
            for name, command in commands.items():
                results[name].append(measure(command))
    finally:
        shutil.rmtree(work)
    seconds = {name: statistics.median(wall for wall, _ in row) for name, row in results.items()}
    unit = seconds["cp"] + seconds["sha256sum"]
    print(f"{shard.stat().st_size / 1e6:.0f} MB checkpoint, {runs} runs, medians\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name, row in results.items():
        peak = statistics.median(memory for _, memory in row)
        print(f"| {name} | {seconds[name]:.2f} | {seconds[name] / unit:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 5)
