"""Held-out metrics of training methods on real tasks, each at its own learning rate, with standard errors.

Usage: python benchmarks/tasks.py TASKS FOLDER [NAME ...]. TASKS contains NAME/train.jsonl and NAME/test.jsonl for each
task in METRICS. FOLDER contains the model in base/ and keeps vectors and scores. Existing ones are reused. The learning
rates are those that benchmarks/rates.py chose on a validation part of the training data. The test part is used for the
final scores only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rates import METHODS, RECIPES, CommandError, best_of, cells_of, named, options_of, parts, taskvec

from taskvec_formats.system.atomic import atomic_file

METRICS = {"mawps": ("loss", "exact_match"), "sql": ("loss", "rouge1", "exact_match")}
# limited, because generating answers takes most of the time
ANSWER = ["--max-new-tokens", "80"]
Scores = dict[str, dict[str, float]]


def score(tasks: Path, folder: Path, task: str, method: str | None) -> Scores:
    """Train and evaluate a method on a task, or load its stored scores.

    Args:
        tasks: The folder of the tasks.
        folder: The folder of the model, vectors and scores.
        task: The name of the task.
        method: The name of the method. None for the base.

    Returns:
        Metric -> value and standard error.
    """
    command: list[object] = ["eval", folder / "base", "--data", tasks / task / "test.jsonl"]
    name = f"{task}-base"
    if method is not None:
        row = (method, RECIPES[task].optimizers[0])
        cells = cells_of(task, row)
        if not cells:
            sys.exit(f"no learning rate of {method} on {task} is known: run benchmarks/rates.py first")
        rate = best_of(cells)
        name = named(task, row, rate)
        vector = folder / f"{name}.lota"
        if not vector.exists():
            data, _ = parts(tasks, folder, task)
            taskvec("train", folder / "base", data, "-o", vector, *options_of(task, row, rate), "--resume")
        command += ["--with", vector]
    report = folder / f"{name}-test.json"
    if not report.exists():
        found = taskvec(*command)["metrics"]
        answers = [word for metric in METRICS[task] if metric != "loss" for word in ("--metric", metric)]
        found |= taskvec(*command, *answers, *ANSWER)["metrics"]
        with atomic_file(report) as temporary:
            temporary.write_text(json.dumps(found) + "\n", encoding="utf-8")
    scores: Scores = json.loads(report.read_text(encoding="utf-8"))
    return scores


def main(tasks: Path, folder: Path, names: list[str]) -> None:
    """Train and evaluate all methods, then print one table per task."""
    for task in names or METRICS:
        rows = {method: score(tasks, folder, task, method) for method in (None, *METHODS)}
        print(f"\n{RECIPES[task]}\n")
        metrics = METRICS[task]
        print("| model | learning rate | " + " | ".join(metrics) + " |\n" + "|---" * (len(metrics) + 2) + "|")
        for method, scores in rows.items():
            row = (str(method), RECIPES[task].optimizers[0])
            rate = "" if method is None else f"{best_of(cells_of(task, row)):.0e}"
            cells = (f"{scores[metric]['value']:.3f} ± {scores[metric]['standard_error']:.3f}" for metric in metrics)
            print(f"| {method or 'base'} | {rate} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 3 or not set(sys.argv[3:]) <= METRICS.keys():
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    except CommandError as error:
        sys.exit(str(error))
