"""Estimates for models of 7, 70 and 405 billion weights, from the runs in `results/large.json`.

Usage: python benchmarks/on_paper.py

The time of a command is modelled as start + a · weights + b · entries. For pack and unpack, a and b follow from the
runs of the smaller model with 1 % and 10 % of the weights. For other commands, a follows from one run of the smaller
model, and b is 0. The estimates are checked against the run of the larger model, whose own rates then give those of
models that were not run.

The memory of training is that of docs/training.md, divided among processes, with RMSprop. It leaves out activations and
the weights of the block that is gathered.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

SIZES = {"7B": 7.24e9, "70B": 70.6e9, "405B": 405.9e9}
START = 0.7  # seconds, of a process that imports numpy and pcodec
DENSITY = 0.1
GPU = 80e9  # bytes
RESULTS = Path(__file__).with_name("results") / "large.json"
PAIRS = {"pack": ("pack, 1 %", "pack, 10 %"), "unpack": ("unpack, 1 %", "unpack, 10 %")}
OTHERS = (
    "read and hash a pair (blake3)",
    "cp -r",
    "verify, 10 %",
    "inspect both",
    "merge by ties to .lota",
    "merge by ties to a folder",
)


def rates(commands: dict[str, list[float]], weights: float) -> dict[str, tuple[float, float]]:
    """Seconds per weight and per entry of each command."""
    found = {name: ((commands[name][0] - START) / weights, 0.0) for name in OTHERS}
    for name, (sparse, dense) in PAIRS.items():
        each = (commands[dense][0] - commands[sparse][0]) / (0.09 * weights)
        found[name] = (max(0.0, commands[sparse][0] - START) / weights - 0.01 * each, each)
    return found


def seconds(rate: tuple[float, float], weights: float) -> float:
    """Time of a command on vectors of 10 %."""
    return START + rate[0] * weights + rate[1] * DENSITY * weights


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    small, large = results["llama-70b"], results["mistral-7b"]
    fitted, ahead = (rates(each["commands"], each["weights"]) for each in (small, large))
    fitted_to, checked = (f"{each['weights'] / 1e9:.2f}" for each in (small, large))
    print(f"fitted to {fitted_to}, checked against {checked} billion weights\n")
    print(f"| command | 7B, estimate | 7B, measured | {' | '.join(list(SIZES)[1:])} |\n|{'---|' * (2 + len(SIZES))}")
    for name, rate in fitted.items():
        measured = large["commands"][PAIRS[name][1] if name in PAIRS else name][0]
        larger = " | ".join(_time(seconds(ahead[name], weights)) for weights in list(SIZES.values())[1:])
        print(f"| {name} | {_time(seconds(rate, large['weights']))} | {_time(measured)} | {larger} |")
    print("\n| bytes | " + " | ".join(SIZES) + f" |\n|{'---|' * (1 + len(SIZES))}")
    # name -> bytes per weight, and whether they are divided among processes
    rows = {
        "model in bf16": (2.0, False),
        "vector of 10 % of the weights": (large["vectors"][1] / large["weights"], False),
        "calibration in f32": (4 + 4 + 4, True),
        "calibration in bf16, --low-memory": (2 + 2 + 2, True),
        "training of 10 %, bf16": (2 + DENSITY * (12 + 4 + 2), True),
        "full fine-tuning in f32": (4 + 4 + 4, True),
    }
    for name, (each, divided) in rows.items():
        cells = []
        for weights in SIZES.values():
            processes = f", {math.ceil(each * weights / GPU)} × 80 GB" if divided else ""
            cells.append(f"{each * weights / 1e9:,.0f} GB{processes}")
        print(f"| {name} | {' | '.join(cells)} |")


def _time(value: float) -> str:
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min"


if __name__ == "__main__":
    main()
