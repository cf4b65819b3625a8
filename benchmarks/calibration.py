"""Time and memory of calibration with `--low-memory`, and how closely its mask matches the exact one.

Usage: python benchmarks/calibration.py BASE FOLDER. Each row is a whole process of `taskvec train` on the SQL task of
the demo.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from processes import measure

from taskvec.demo.tasks import write_task

STEPS = ["--batch-size", "2", "--lr", "2e-5"]
MASK = [*STEPS, "--steps", "0", "--calibration-steps", "12"]
RUNS = {
    "full fine-tuning, 3 steps": ["--method", "fft", *STEPS, "--steps", "3"],
    "exact": MASK,
    "low memory": [*MASK, "--low-memory"],
    "exact, data in another order": [*MASK, "--seed", "1"],
}


def shared(taskvec: str, one: Path, other: Path) -> float:
    """The share of the positions of one mask that are also in another mask of the same size."""
    inspected = subprocess.run([taskvec, "inspect", str(one), str(other), "--json"], stdout=subprocess.PIPE, check=True)
    report = json.loads(inspected.stdout)
    return float(report["overlap"][0]["intersection"]) / float(report["files"][0]["entries"])


def main(base: Path, folder: Path) -> None:
    """Run all configurations and print the table."""
    taskvec = str(Path(sys.executable).with_name("taskvec"))
    data, _ = write_task("sql", folder / "data", 400, 32)
    print("| calibration | peak MB | seconds | of the exact mask |\n|---|---|---|---|")
    for name, options in RUNS.items():
        file = folder / f"{'-'.join(name.replace(',', '').split())}.lota"
        seconds, peak = measure([taskvec, "train", str(base), str(data), "-o", str(file), "--force", *options])
        same = "" if "fft" in options else f"{shared(taskvec, folder / 'exact.lota', file):.2%}"
        print(f"| {name} | {peak:.0f} | {seconds:.0f} | {same} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
