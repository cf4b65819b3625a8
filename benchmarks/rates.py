"""Learning rates for methods and optimizers: a sweep on real tasks, scored on a validation part of the training data.

Usage: python benchmarks/rates.py TASKS FOLDER [RECIPE ...]. TASKS contains train.jsonl of the tasks in RECIPES, each in
a folder of its name. The test part is not read. FOLDER contains the model in base/, and keeps the split data and the
best vector of each method. Every cell (recipe, method, optimizer, rate) is a JSON file in benchmarks/results/rates, and
is computed only if that file is missing. The tables are made from these files.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec_formats.system.atomic import atomic_file

RESULTS = Path(__file__).parent / "results" / "rates"
VALIDATION = 128  # number of validation examples


@dataclass(frozen=True)
class Recipe:
    """The budget of one sweep. No example is used twice, and the steps of calibration are part of the budget.

    Attributes:
        task: The name of the task.
        steps: The number of steps, including calibration.
        batch: Examples per step.
        optimizers: The optimizers to compare. RMSprop is the paper's.
    """

    task: str
    steps: int
    batch: int
    optimizers: tuple[str, ...] = ("rmsprop",)

    def __str__(self) -> str:
        return f"{self.task}, {self.steps} steps of {self.batch} examples"


RECIPES = {
    "mawps": Recipe("mawps", 50, 8),
    "sql": Recipe("sql", 40, 4),
    "optimizers": Recipe("mawps", 20, 8, ("adam", "sgd")),
}
GRID = (1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
CALIBRATION = 5  # one fifth of the steps is calibration
METHODS = {
    "full fine-tuning": ["--method", "fft"],
    "LoRA, r=64": ["--method", "lora"],
    "LoTA, 90 % sparse": ["--sparsity", "0.9"],
    "random mask, 90 % sparse": ["--sparsity", "0.9", "--mask", "random"],
}
DENSE, ADAPTED, CALIBRATED, _ = METHODS
Row = tuple[str, str]  # method and optimizer
Cell = dict[str, Any]


class CommandError(Exception):
    """A taskvec command failed. The message is its error output."""


def taskvec(*arguments: object) -> Any:
    """Run a taskvec command with --json.

    Args:
        *arguments: The command and its arguments.

    Returns:
        The report.

    Raises:
        CommandError: The command failed.
    """
    command = [str(Path(sys.executable).with_name("taskvec")), *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CommandError(done.stderr.strip())
    return json.loads(done.stdout)


def parts(tasks: Path, folder: Path, recipe: str) -> tuple[Path, Path]:
    """Split the training data with a fixed seed.

    Args:
        tasks: The folder of the tasks.
        folder: The folder to write to.
        recipe: The name of the recipe.

    Returns:
        The file to train on and the file to validate on.
    """
    task = RECIPES[recipe].task
    files = folder / f"{task}-train.jsonl", folder / f"{task}-validation.jsonl"
    rows = (tasks / task / "train.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(rows)
    for file, chosen in zip(files, (rows[VALIDATION:], rows[:VALIDATION]), strict=True):
        with atomic_file(file) as temporary:
            temporary.write_text("".join(f"{row}\n" for row in chosen), encoding="utf-8")
    return files


def rows_of(recipe: str) -> list[Row]:
    """The methods and optimizers of a recipe; without the random mask if there are several optimizers."""
    optimizers = RECIPES[recipe].optimizers
    methods = list(METHODS) if len(optimizers) == 1 else [DENSE, ADAPTED, CALIBRATED]
    return [(method, optimizer) for optimizer in optimizers for method in methods]


def first_rates(row: Row) -> tuple[float, ...]:
    """The three rates to begin with."""
    if row[1] == "sgd":
        return (1e-1, 3e-1, 1.0)
    return (1e-5, 3e-5, 1e-4) if row[0] == DENSE else (1e-4, 3e-4, 1e-3)


def named(recipe: str, row: Row, rate: float) -> str:
    """The name of a cell, used for its files."""
    method, optimizer = row
    words = [recipe, "".join(c if c.isalnum() else "-" for c in method)]
    return "-".join([*words, *[optimizer] * (len(RECIPES[recipe].optimizers) > 1), f"{rate:.0e}"])


def cells_of(recipe: str, row: Row) -> dict[float, Cell]:
    """Rate -> cell, for all cells of a row that are on disk."""
    found: dict[float, Cell] = {}
    for rate in GRID:
        file = RESULTS / f"{named(recipe, row, rate)}.json"
        if file.exists():
            found[rate] = json.loads(file.read_text(encoding="utf-8"))
    return found


def best_of(cells: dict[float, Cell]) -> float:
    """The rate with the lowest validation loss."""
    return min(cells, key=lambda rate: cells[rate]["loss"]["value"] if cells[rate]["loss"] else float("inf"))


def options_of(recipe: str, row: Row, rate: float) -> list[str]:
    """The options of `taskvec train` for a cell, without its files."""
    (method, optimizer), steps = row, RECIPES[recipe].steps
    options = [*METHODS[method], "--lr", f"{rate:g}", "--optimizer", optimizer]
    options += ["--batch-size", str(RECIPES[recipe].batch), "--max-length", "512"]
    if method == CALIBRATED:
        calibration = steps // CALIBRATION
        dense = best_of(cells_of(recipe, (DENSE, optimizer)))  # calibration is full fine-tuning
        options += ["--calibration-steps", str(calibration), "--calibration-lr", f"{dense:g}"]
        steps -= calibration
    return [*options, "--steps", str(steps)]


def compute(base: Path, folder: Path, data: tuple[Path, Path], recipe: str, row: Row, rate: float) -> Cell:
    """Train and validate one cell, and store it. Its vector is kept while it is the best of its row.

    Args:
        base: The model.
        folder: The folder of the vectors.
        data: The file to train on and the file to validate on.
        recipe: The name of the recipe.
        row: The method and the optimizer.
        rate: The learning rate.

    Returns:
        The cell.
    """
    name, options = named(recipe, row, rate), options_of(recipe, row, rate)
    print(f"computing {name}", file=sys.stderr, flush=True)
    vector = folder / f"{name}.lota"
    cell: Cell = {"recipe": recipe, "method": row[0], "optimizer": row[1], "rate": rate, "options": options}
    try:
        if not vector.exists():
            taskvec("train", base, data[0], "-o", vector, *options, "--resume")
        report = taskvec("eval", base, "--data", data[1], "--with", vector)
        cell |= {"loss": report["metrics"]["loss"], "examples": report["examples"]}
    except CommandError as error:
        # the messages of training that diverged, and of evaluating its result
        if "; try a lower --" not in str(error) and "the loss is" not in str(error):
            sys.exit(f"{name}: {error}")
        cell |= {"loss": None, "diverged": str(error)}
    RESULTS.mkdir(parents=True, exist_ok=True)
    with atomic_file(RESULTS / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
    cells = cells_of(recipe, row)
    for other in cells:
        if other != best_of(cells):
            (folder / f"{named(recipe, row, other)}.lota").unlink(missing_ok=True)
    return cell


def sweep(tasks: Path, folder: Path, recipe: str, row: Row) -> dict[float, Cell]:
    """Compute the cells of a row: the first rates, then more until the best rate has a worse one on each side.

    Args:
        tasks: The folder of the tasks.
        folder: The folder of the model and the vectors.
        recipe: The name of the recipe.
        row: The method and the optimizer.

    Returns:
        Rate -> cell.
    """
    data = parts(tasks, folder, recipe)
    cells, wanted = cells_of(recipe, row), list(first_rates(row))
    while missing := [rate for rate in wanted if rate not in cells]:
        for rate in missing:
            cells[rate] = compute(folder / "base", folder, data, recipe, row, rate)
        place = GRID.index(best_of(cells))
        wanted = list(GRID[max(0, place - 1) : place + 2])
    return cells


def main(tasks: Path, folder: Path, names: list[str]) -> None:
    """Compute the missing cells, then print one table per recipe."""
    for recipe in names or RECIPES:
        rows = {row: sweep(tasks, folder, recipe, row) for row in rows_of(recipe)}
        rates = sorted({rate for cells in rows.values() for rate in cells})
        print(f"\n{RECIPES[recipe]}: loss on {VALIDATION} validation examples\n")
        header = " | ".join(f"{rate:.0e}" for rate in rates)
        print(f"| method | optimizer | {header} |\n" + "|---" * (len(rates) + 2) + "|")
        for (method, optimizer), cells in rows.items():
            best = best_of(cells)
            print(
                f"| {method} | {optimizer} | "
                + " | ".join(_text(cells.get(rate), rate == best) for rate in rates)
                + " |"
            )


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
