"""Training a task vector: from a base, data and options to a vector and what is to be said about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec_formats import Checkpoint

from ..applying.overlay import Patched
from ..reporting.progress import Progress, silent
from ..vectors.diff import diff
from ..vectors.lineage import shortened
from ..vectors.vector import TaskVector
from .folder import RunFolder
from .masking import free_share
from .options import TrainingOptions
from .request import Request

if TYPE_CHECKING:
    from ..data.rows import RowCounts
    from .loop import Curve
    from .run import Run


@dataclass(frozen=True)
class TrainingResult:
    """What came out of a training run.

    Attributes:
        vector: The task vector, in memory.
        calibration_losses: One per step of calibration; none if the mask needed no calibration.
        calibration_lr: The learning rate of calibration; None without calibration. That of training is the curve's.
        curve: Losses and evaluations of training, and its speed.
        free: Tensor name -> the share of its weights that neither this mask nor an earlier one holds; empty without
            masks.
        free_share: The same of all eligible weights; None without masks.
        entries: Of the mask, or of the whole vector if there is none.
        survived: Entries that change the bits of their weight; the others are rounded away in the base's dtype.
        rows: What became of the examples to train on.
        eval_rows: What became of those held out.
        unreached: The share of eligible weights in tensors that calibration gave no gradient; None without
            calibration.
    """

    vector: TaskVector
    calibration_losses: list[float]
    calibration_lr: float | None
    curve: Curve
    free: dict[str, float]
    free_share: float | None
    entries: int
    survived: int
    rows: RowCounts
    eval_rows: RowCounts
    unreached: float | None


def train(
    base: Checkpoint,
    data: Path,
    options: TrainingOptions,
    progress: Progress = silent,
    *,
    mask_from: TaskVector | None = None,
    disjoint_from: Sequence[TaskVector] = (),
    start_from: TaskVector | None = None,
    mix: Sequence[tuple[Path, float]] = (),
    eval_data: Path | None = None,
    folder: Path | None = None,
    resume: bool = True,
) -> TrainingResult:
    """Train a task vector: `taskvec.train` with opened models and vectors.

    A ticket has exactly k entries, relative to where it starts. Every other weight of the trained model has the bits of
    the start at the end, and applying the vector gives the trained weights to the last bit: both are checked tensor by
    tensor.
    """
    request = Request(base, data, options, mask_from, disjoint_from, start_from, mix, eval_data)
    request.check(folder)
    return _train(request.with_defaults(), progress, folder, resume=resume)


def _train(request: Request, progress: Progress, folder: Path | None, *, resume: bool = True) -> TrainingResult:
    corpus = request.prepare()
    record = request.record(corpus)
    options = request.options
    with RunFolder(folder, record, resume=resume) as keep:
        denser = None if options.via is None else _denser(request, keep, progress)
        dense = options.method == "fft" or (request.calibrates and denser is None and not options.low_memory)
        run = request.open(corpus, progress, dense=dense)
        result = _ticket(request, run, keep, denser) if options.method == "lota" else _dense(run, keep)
        if request.start_from is not None and options.relative_to == "base":
            result = replace(result, vector=diff(request.base, Patched(run.start, result.vector), progress=progress))
    result.vector.header.provenance.update(
        _provenance(request, result), examples=len(corpus.train), made_by="train", run=record
    )
    return result


def _denser(request: Request, keep: RunFolder, progress: Progress) -> TaskVector:
    """The ticket that is trained first, whose largest entries are the mask (arXiv 2406.16797, 99 %*)."""
    start = "base" if request.start_from is None else "start"
    options = replace(request.options, sparsity=request.options.via, via=None, relative_to=start)

    def labelled(stage: str, done: int, total: int, note: str) -> None:
        progress(f"{options.sparsity:.0%}: {stage}", done, total, note)

    return keep.vector("via", lambda: _train(replace(request, options=options), labelled, keep.below("via")).vector)


def _ticket(request: Request, run: Run, keep: RunFolder, denser: TaskVector | None) -> TrainingResult:
    """Train what a mask holds; denser: the ticket whose largest entries the mask is."""
    from .ticket import train_ticket

    taken = run.taken(request.disjoint_from)
    ticket = train_ticket(run, keep, taken, request.mask_from or denser)
    masks = {name: ticket.vector[name].indices for name in ticket.vector}
    entries = sum(map(len, masks.values()))
    # of the calibration that chose the mask
    found: dict[str, Any] = {"unreached": ticket.unreached, "calibration_lr": ticket.calibration_lr}
    if denser is not None:
        found = {name: denser.provenance[name] for name in found}
    return TrainingResult(
        vector=ticket.vector,
        calibration_losses=ticket.calibration_losses,
        curve=ticket.curve,
        free=free_share([taken, masks], run.forms),
        free_share=1 - (sum(map(len, taken.values())) + entries) / run.eligible,
        entries=entries,
        survived=ticket.survived,
        rows=run.counts,
        eval_rows=run.eval_counts,
        **found,
    )


def _dense(run: Run, keep: RunFolder) -> TrainingResult:
    """Train by one of the methods without a mask."""
    from .dense import difference, train_fully, train_lora

    curve = train_fully(run, keep) if run.options.method == "fft" else train_lora(run, keep)
    vector = difference(run)
    entries = sum(len(vector.change(name).touched()) for name in vector)
    return TrainingResult(vector, [], None, curve, {}, None, entries, entries, run.counts, run.eval_counts, None)


def _provenance(request: Request, result: TrainingResult) -> dict[str, Any]:
    """What the file says of the run besides its record."""
    options, curve = request.options, result.curve
    return {
        "method": options.method,
        "data": shortened(request.data.name),
        "sparsity": options.sparsity,
        "lr": curve.lr,
        "calibration_lr": result.calibration_lr,
        "steps": len(curve.losses),
        "kept_step": curve.kept,
        "final_loss": curve.final_loss,
        "eval_loss": curve.eval_loss,
        **{f"eval_{name}": dict(points).get(curve.kept) for name, points in curve.eval_metrics.items()},
        "survived": result.survived,
        "unreached": result.unreached,
        "mask_from": request.mask_from and shortened(request.mask_from.name),
        "disjoint_from": [shortened(earlier.name) for earlier in request.disjoint_from],
        "start_from": request.start_from and shortened(request.start_from.name),
    }
