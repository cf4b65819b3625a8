"""Which learning rate suits which method: a sweep on real tasks, scored on a validation part of the training data.

Usage: python benchmarks/rates.py TASKS FOLDER [NAME ...]. TASKS holds NAME/train.jsonl for each task in RECIPES; the
test part is not read. FOLDER holds the model in base/, and keeps the split data and the best vector of each method.
Every cell (a task, a method, a rate) is a JSON file in benchmarks/results/rates, and is not computed again while it is
there. The table is made from these files.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from taskvec_formats.atomic import atomic_file

RESULTS = Path(__file__).parent / "results" / "rates"
VALIDATION = 128  # examples that the rates are chosen on
# task -> steps, examples a step; no example is seen twice, and calibration takes its steps from the same budget
RECIPES = {"mawps": (50, 8), "sql": (40, 4)}
GRID = (1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
CALIBRATION = 5  # one in so many of the budget's steps
METHODS = {
    "full fine-tuning": ["--method", "fft"],
    "LoRA, r=64": ["--method", "lora"],
    "LoTA, 90 % sparse": ["--sparsity", "0.9"],
    "random mask, 90 % sparse": ["--sparsity", "0.9", "--mask", "random"],
}
FIRST = {"full fine-tuning": (1e-5, 3e-5, 1e-4)}
CALIBRATED = "LoTA, 90 % sparse"
Cell = dict[str, Any]


class CommandError(Exception):
    """A taskvec command failed; its text is what it said."""


def taskvec(*arguments: object) -> Any:
    """Run a taskvec command with --json and return its report. Raises CommandError."""
    command = [str(Path(sys.executable).with_name("taskvec")), *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CommandError(done.stderr.strip())
    return json.loads(done.stdout)


def parts(tasks: Path, folder: Path, task: str) -> tuple[Path, Path]:
    """The training data of a task in two files, to train on and to validate on, drawn with a fixed seed."""
    files = folder / f"{task}-train.jsonl", folder / f"{task}-validation.jsonl"
    rows = (tasks / task / "train.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(rows)
    for file, chosen in zip(files, (rows[VALIDATION:], rows[:VALIDATION]), strict=True):
        with atomic_file(file) as temporary:
            temporary.write_text("".join(f"{row}\n" for row in chosen), encoding="utf-8")
    return files


def named(task: str, method: str, rate: float) -> str:
    """The name of a cell."""
    return f"{task}-{''.join(c if c.isalnum() else '-' for c in method)}-{rate:.0e}"


def cells_of(task: str, method: str) -> dict[float, Cell]:
    """Rate -> cell of all cells on file."""
    found: dict[float, Cell] = {}
    for rate in GRID:
        file = RESULTS / f"{named(task, method, rate)}.json"
        if file.exists():
            found[rate] = json.loads(file.read_text(encoding="utf-8"))
    return found


def best_of(cells: dict[float, Cell]) -> float:
    """The rate of the lowest validation loss."""
    return min(cells, key=lambda rate: cells[rate]["loss"]["value"] if cells[rate]["loss"] else float("inf"))


def options_of(task: str, method: str, rate: float) -> list[str]:
    """What `taskvec train` is given for a cell, besides its files."""
    steps, batch = RECIPES[task]
    options = [*METHODS[method], "--lr", f"{rate:g}", "--batch-size", str(batch), "--max-length", "512"]
    if method == CALIBRATED:
        calibration = steps // CALIBRATION
        dense = best_of(cells_of(task, "full fine-tuning"))  # calibration is full fine-tuning
        options += ["--calibration-steps", str(calibration), "--calibration-lr", f"{dense:g}"]
        steps -= calibration
    return [*options, "--steps", str(steps)]


def compute(base: Path, folder: Path, data: tuple[Path, Path], task: str, method: str, rate: float) -> Cell:
    """Train and validate one cell; its vector stays in FOLDER while it is the best of its method."""
    name, options = named(task, method, rate), options_of(task, method, rate)
    print(f"computing {name}", file=sys.stderr, flush=True)
    vector = folder / f"{name}.lota"
    cell: Cell = {"task": task, "method": method, "rate": rate, "options": options, "loss": None}
    try:
        if not vector.exists():
            taskvec("train", base, data[0], "-o", vector, *options, "--resume")
        report = taskvec("eval", base, "--data", data[1], "--with", vector)
        cell |= {"loss": report["metrics"]["loss"], "examples": report["examples"]}
    except CommandError as error:
        # of training that diverged, and of evaluating what it left
        if "try a lower --lr" not in str(error) and "the loss is" not in str(error):
            sys.exit(f"{name}: {error}")
        cell["diverged"] = str(error)
    RESULTS.mkdir(parents=True, exist_ok=True)
    with atomic_file(RESULTS / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
    cells = cells_of(task, method)
    for other in cells:
        if other != best_of(cells):
            (folder / f"{named(task, method, other)}.lota").unlink(missing_ok=True)
    return cell


def sweep(tasks: Path, folder: Path, task: str, method: str) -> dict[float, Cell]:
    """All cells of a method on a task: its first rates, and more until the best has a worse one on each side."""
    data = parts(tasks, folder, task)
    cells, wanted = cells_of(task, method), list(FIRST.get(method, (1e-4, 3e-4, 1e-3)))
    while missing := [rate for rate in wanted if rate not in cells]:
        for rate in missing:
            cells[rate] = compute(folder / "base", folder, data, task, method, rate)
        place = GRID.index(best_of(cells))
        wanted = list(GRID[max(0, place - 1) : place + 2])
    return cells


def main(tasks: Path, folder: Path, names: list[str]) -> None:
    """Compute what is missing, then print one table a task."""
    for task in names or RECIPES:
        rows = {method: sweep(tasks, folder, task, method) for method in METHODS}
        rates = sorted({rate for cells in rows.values() for rate in cells})
        steps, batch = RECIPES[task]
        print(f"\n{task}: loss on {VALIDATION} validation examples, {steps} steps of {batch} examples\n")
        print("| method | " + " | ".join(f"{rate:.0e}" for rate in rates) + " |\n" + "|---" * (len(rates) + 1) + "|")
        for method, cells in rows.items():
            best = best_of(cells)
            print(f"| {method} | " + " | ".join(_text(cells.get(rate), rate == best) for rate in rates) + " |")


def _text(cell: Cell | None, is_best: bool) -> str:
    if cell is None:
        return ""
    if cell["loss"] is None:
        return "diverged"
    text = f"{cell['loss']['value']:.3f} ± {cell['loss']['standard_error']:.3f}"
    return f"**{text}**" if is_best else text


if __name__ == "__main__":
    if len(sys.argv) < 3 or not set(sys.argv[3:]) <= RECIPES.keys():
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
