"""What methods learn on real tasks: held-out metrics of the base and of vectors trained by one recipe.

Usage: python benchmarks/tasks.py TASKS FOLDER [NAME ...]. TASKS holds NAME/train.jsonl and NAME/test.jsonl for each
task in RECIPES. FOLDER holds the model in base/ and keeps vectors and scores; what is there is not made again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from taskvec_formats.atomic import atomic_file

# one schedule for all; no example is seen twice
COMMON = "--max-length 512 --schedule linear --warmup-steps 3".split()
# steps, examples a step, and the metrics that suit the task
RECIPES = {"mawps": (50, 8, ("loss", "exact_match")), "sql": (40, 4, ("loss", "rouge1", "exact_match"))}
# writing answers takes most of the time; the loss is of the whole test set
ANSWERS = ["--limit", "96", "--max-new-tokens", "80"]
# each method at a learning rate of its own: a tenth of the weights has to go further
TICKET = ["--sparsity", "0.9", "--lr", "2e-4"]
METHODS = {
    "base": None,
    "full fine-tuning": ["--method", "fft", "--lr", "3e-5"],
    "LoTA, 90 % sparse": [*TICKET, "--calibration-lr", "3e-5", "--calibration-steps", "16"],
    "random mask, 90 % sparse": [*TICKET, "--mask", "random"],
}


def run(command: list[str]) -> str:
    """Run a taskvec command and return what it prints; its errors end this program."""
    taskvec = str(Path(sys.executable).with_name("taskvec"))
    done = subprocess.run([taskvec, *command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"taskvec {' '.join(command)}: exit status {done.returncode}")
    return done.stdout


def score(base: Path, tasks: Path, folder: Path, task: str, method: str) -> dict[str, dict[str, float]]:
    """Metric -> value and standard error of one method on one task, trained and evaluated unless that was done."""
    steps, batch, metrics = RECIPES[task]
    options = METHODS[method]
    name = f"{task}-{''.join(c if c.isalnum() else '-' for c in method)}"
    vector, report = folder / f"{name}.lota", folder / f"{name}.json"
    if options is not None and not vector.exists():
        data = str(tasks / task / "train.jsonl")
        length = ["--steps", str(steps), "--batch-size", str(batch)]
        run(["train", str(base), data, "-o", str(vector), *COMMON, *length, *options, "--resume"])
    if not report.exists():
        command = ["eval", str(base), "--data", str(tasks / task / "test.jsonl"), "--json"]
        command += [] if options is None else ["--with", str(vector)]
        found: dict[str, Any] = {}
        for asked, limit in ((("loss",), []), (tuple(metric for metric in metrics if metric != "loss"), ANSWERS)):
            words = [word for metric in asked for word in ("--metric", metric)]
            found |= json.loads(run([*command, *words, *limit]))["metrics"]
        with atomic_file(report) as temporary:
            temporary.write_text(json.dumps(found) + "\n", encoding="utf-8")
    scores: dict[str, dict[str, float]] = json.loads(report.read_text(encoding="utf-8"))
    return scores


def main(tasks: Path, folder: Path, names: list[str]) -> None:
    """Train and evaluate all, then print one table a task."""
    base = folder / "base"
    for task in names or RECIPES:
        steps, batch, metrics = RECIPES[task]
        rows = {method: score(base, tasks, folder, task, method) for method in METHODS}
        print(f"\n{task}, {steps} steps of {batch} examples\n")
        print("| model | " + " | ".join(metrics) + " |\n" + "|---" * (len(metrics) + 1) + "|")
        for method, scores in rows.items():
            cells = (f"{scores[metric]['value']:.3f} ± {scores[metric]['standard_error']:.3f}" for metric in metrics)
            print(f"| {method} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 3 or not set(sys.argv[3:]) <= RECIPES.keys():
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
