"""The steps of the demo: train, store, merge and compare two sparse task vectors, and evaluate the result."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from taskvec_formats import Checkpoint, ModelFolder
from taskvec_formats.system.atomic import atomic_file

from ..analysis.overlap import Overlap, overlap
from ..applying.apply import apply
from ..merging.combine import merge
from ..packages import require
from ..reporting.progress import Progress, silent
from ..resume import RecordedFolder
from ..vectors.vector import TaskVector
from .smollm2 import write_base
from .tasks import TASKS, write_task

TRAIN_ITEMS, TEST_ITEMS = 400, 32
SPARSITY = 0.9
_METRICS = ("loss", "exact_match")  # the fields of TaskScore
# chosen to give a good ticket within two minutes on two cores; no example is repeated within a phase
RECIPE: dict[str, Any] = {
    "sparsity": SPARSITY,
    "calibration_steps": 8,
    "steps": 16,
    "lr": 2e-4,
    "calibration_lr": 2e-5,
    "schedule": "linear",
    "warmup_steps": 3,
    "batch_size": 8,
}


@dataclass(frozen=True)
class TaskScore:
    """Held-out scores of one model on one task.

    Attributes:
        loss: Nats per completion token.
        exact_match: The share of exact matches. For the maths task only the final number is compared.
    """

    loss: float
    exact_match: float


@dataclass(frozen=True)
class Demo:
    """The results of the demo.

    Attributes:
        folder: The folder of the demo.
        scores: Model name ("base", the tasks, "merged") -> task -> TaskScore.
        sizes: File or folder -> bytes.
        overlap: The overlap of the two masks.
        picture: The plot of the overlap.
        method: The method by which the vectors were merged.
        reason: Why this method was chosen.
        samples: One (question, answer) pair of the merged model per task.
    """

    folder: Path
    scores: dict[str, dict[str, TaskScore]]
    sizes: dict[str, int]
    overlap: Overlap
    picture: Path
    method: str
    reason: str
    samples: list[tuple[str, str]]


def run(folder: Path, progress: Progress = silent) -> Demo:
    """Run the demo in a folder. Results of an earlier run are reused, and so is an existing `base/`.

    Args:
        folder: The folder for data, vectors and models.
        progress: Called with the stage, steps done, steps in total, and a note.

    Returns:
        The results.

    Raises:
        ResumeError: The folder contains files that are not of an earlier run.
        UsageError: The model or a package that reads it is missing. The errors of training and merging are raised too.
    """
    require("the demo", "demo")
    with RecordedFolder(folder, "demo", {}, beside=("base",)) as keep:
        keep.begin()
        return _run(folder, progress)


def _run(folder: Path, progress: Progress) -> Demo:
    base_folder, picture = folder / "base", folder / "overlap.png"
    tickets = {task: folder / f"{task}.lota" for task in TASKS}
    data = {task: write_task(task, folder / "data", TRAIN_ITEMS, TEST_ITEMS) for task in TASKS}
    if not base_folder.exists():
        progress("preparing SmolLM2-135M", 0, 1, "")
        write_base(base_folder)
        progress("preparing SmolLM2-135M", 1, 1, "")
    base = ModelFolder(base_folder, name="SmolLM2-135M-Instruct")
    for task, ticket in tickets.items():
        if not ticket.exists():
            _train(task, base, data[task][0], ticket, progress)

    vectors = [TaskVector.open(ticket) for ticket in tickets.values()]
    merged = merge(vectors, progress=progress)
    merged_file, merged_folder = folder / "merged.lota", folder / "merged"
    if _outdated(merged_file, *tickets.values()):
        merged.save(merged_file, progress, force=True)
    if _outdated(merged_folder, merged_file):
        apply(TaskVector.open(merged_file), base, merged_folder, progress, force=True)
    pair = overlap(vectors, progress)[0]
    if _outdated(picture, *tickets.values()):
        from ..analysis.plots import plot_overlap

        plot_overlap(list(tickets), [pair], picture, force=True)

    scores, samples = _scores(folder, base, tickets, {task: paths[1] for task, paths in data.items()}, progress)
    sizes = {path.name: path.stat().st_size for path in (*tickets.values(), merged_file)}
    sizes["dense checkpoint"] = sum(shard.path.stat().st_size for shard in base.shards)
    provenance = merged.provenance
    return Demo(folder, scores, sizes, pair, picture, provenance["method"], provenance["reason"], samples)


def _outdated(target: Path, *sources: Path) -> bool:
    """Whether `target` is missing or older than one of its sources."""
    return not target.exists() or any(source.stat().st_mtime > target.stat().st_mtime for source in sources)


def _train(task: str, base: Checkpoint, data: Path, ticket: Path, progress: Progress) -> None:
    from ..training.options import TrainingOptions
    from ..training.train import train

    def labelled(stage: str, done: int, total: int, note: str) -> None:
        progress(f"{task}: {stage}", done, total, note)

    train(base, data, TrainingOptions(**RECIPE), labelled).vector.save(ticket, labelled)


def _scores(
    folder: Path, base: Checkpoint, tickets: dict[str, Path], tests: dict[str, Path], progress: Progress
) -> tuple[dict[str, dict[str, TaskScore]], list[tuple[str, str]]]:
    """Score the base, the tickets and the merged model on every task, or load the scores of an earlier run."""
    report = folder / "scores.json"
    # stored scores are valid only for the files that were scored
    models = {**tickets, "merged": folder / "merged.lota"}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in models.items()}
    if report.exists():
        saved = json.loads(report.read_text(encoding="utf-8"))
        if saved["vectors"] == digests:
            scores = {
                model: {task: TaskScore(**score) for task, score in row.items()}
                for model, row in saved["scores"].items()
            }
            return scores, [(question, answer) for question, answer in saved["samples"]]

    from ..data.examples import read_examples
    from ..evaluation.evaluate import evaluate
    from ..models.attach import attach
    from ..models.loading import load_model

    model, tokenizer = load_model(base.path)
    examples = {task: read_examples(path) for task, path in tests.items()}
    scores, samples = {}, []
    for name in ("base", *models):
        vector = None if name == "base" else TaskVector.open(models[name])
        scores[name] = {}
        with attach(model, vector, base=base):
            for task, held_out in examples.items():
                stage = f"evaluating {name} on {task}"
                found = evaluate(model, tokenizer, held_out, _METRICS, stage=stage, progress=progress)
                scores[name][task] = TaskScore(*(found.metrics[metric].value for metric in _METRICS))
                if name == "merged":
                    samples.append((held_out[0].messages[0]["content"], found.answers[0]))
    document = {
        "vectors": digests,
        "scores": {name: {task: asdict(score) for task, score in row.items()} for name, row in scores.items()},
        "samples": samples,
    }
    with atomic_file(report) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return scores, samples
