"""Training of a task vector from a base, data and options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from taskvec_formats import Checkpoint

from ..applying.overlay import Patched
from ..reporting.progress import Progress, silent
from ..vectors.diff import diff
from ..vectors.lineage import shortened
from ..vectors.vector import TaskVector
from .chain import label, previous
from .masking import free_share
from .options import TrainingOptions
from .request import Request
from .result import TrainingResult

if TYPE_CHECKING:
    from .folder import RunFolder
    from .processes import Processes
    from .run import Run


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

    A ticket has exactly k entries, relative to where it starts. All other weights of the trained model have the bits of
    the start, and applying the vector gives the trained weights bit for bit. Both are checked tensor by tensor.

    Started by torchrun or `accelerate launch`, the processes train one model, which they divide. All of them call this
    with the same arguments and get the same result. One of them may save the vector.

    Args:
        base: The checkpoint of a model folder.
        data: A file, a folder of files or a Hub id (`data.sources`).
        options: How to train.
        progress: Called with the stage, the steps done, the steps in all, and a note.
        mask_from: Take the mask from this vector instead of calibrating.
        disjoint_from: Vectors of earlier tasks whose positions stay out of the mask (LoTTO).
        start_from: Start at base + this vector.
        mix: Further data, and the share of the examples to draw from each.
        eval_data: Data to evaluate on.
        folder: Stores what is needed to resume the run after an interruption. Several processes need it.
        resume: Whether to resume a run in `folder`. False removes it and starts again.

    Returns:
        The vector, the losses and counts.

    Raises:
        UsageError: Options contradict each other or have no effect; a file or package is missing.
        DataError: A row of the data cannot be understood.
        MaskError: A mask does not fit the model, or fewer weights are free than it needs.
        TrainingError: The model cannot be trained.
        StoppedError: The process received SIGINT or SIGTERM.
        ProcessError: Another process of the run has ended or does not answer.
        DivergedError: The loss or the weights are not finite.
        ResumeError: `folder` contains another run, or is in use.
        BaseMismatchError: A vector does not fit the base.
        FormatError: A file cannot be read.
    """
    request = Request(base, data, options, mask_from, disjoint_from, start_from, mix, eval_data)
    request.check(folder)
    from .processes import join

    processes = join(options)
    request.check_processes(processes, folder)
    shown = progress if processes.is_first else silent
    with processes.watching():
        return _train(request.with_defaults(), shown, folder, processes, resume=resume)


def _train(
    request: Request,
    progress: Progress,
    folder: Path | None,
    processes: Processes,
    *,
    resume: bool = True,
    prefix: str = "",
) -> TrainingResult:
    """Train, and show `prefix` in front of each stage."""
    from .folder import RunFolder

    def shown(stage: str, done: int, total: int, note: str) -> None:
        progress(prefix + stage, done, total, note)

    with processes.agreeing():
        corpus = request.prepare()
    record = request.agreed_record(corpus, processes, shown)
    options = request.options

    def described(vector: TaskVector, result: TrainingResult) -> TaskVector:
        vector.name = shortened(request.data.stem) or options.method
        vector.header.provenance.update(
            _provenance(request, result), examples=len(corpus.train), made_by="train", run=record
        )
        return vector

    with RunFolder(folder, record, resume=resume, processes=processes) as keep:
        earlier = _earlier(request, keep, progress, processes) if options.via else None
        dense = options.method == "fft" or (request.calibrates and earlier is None and not options.low_memory)
        run = request.open(corpus, shown, processes, dense=dense)
        result = _ticket(request, run, keep, earlier) if options.method == "lota" else _dense(run, keep)
        vector = described(result.vector, result)
        if processes.count > 1:
            vector = keep.vector("trained", lambda: vector, run.owned, shown)
        if request.start_from is not None and options.relative_to == "base":
            vector = described(diff(request.base, Patched(run.start, vector), progress=shown), result)
    return replace(result, vector=vector)


def _earlier(request: Request, keep: RunFolder, progress: Progress, processes: Processes) -> TaskVector:
    """Train the ticket whose largest entries are the mask."""
    start = "base" if request.start_from is None else "start"
    options = replace(previous(request.options), relative_to=start)

    def ticket() -> TaskVector:
        wanted, prefix = replace(request, options=options), label(options)
        result = _train(wanted, progress, keep.below("via"), processes, prefix=prefix)
        warnings = [prefix + warning for warning in result.warnings[len(result.via_warnings) :]]
        result.vector.header.provenance["warnings"] = [*result.via_warnings, *warnings]
        return result.vector

    return keep.vector("via", ticket)


def _ticket(request: Request, run: Run, keep: RunFolder, earlier: TaskVector | None) -> TrainingResult:
    """Train a ticket; its mask is the largest entries of `earlier` if given."""
    from .ticket import train_ticket

    taken = run.taken(request.disjoint_from)
    ticket = train_ticket(run, keep, taken, request.mask_from or earlier)
    counts = run.count({name: ticket.vector[name].indices for name in ticket.vector}), run.count(taken)
    entries = sum(counts[0].values())
    # the record of the calibration that chose the mask
    found: dict[str, Any] = {"unreached": ticket.unreached, "calibration_lr": ticket.calibration_lr}
    if earlier is not None:
        found = {name: earlier.provenance[name] for name in found}
        found["via_lr"] = (*earlier.provenance["via_lr"], earlier.provenance["lr"])
        found["via_warnings"] = tuple(earlier.provenance["warnings"])
    return TrainingResult(
        vector=ticket.vector,
        calibration_losses=ticket.calibration_losses,
        curve=ticket.curve,
        free=free_share(counts, run.forms),
        free_share=1 - sum(sum(count.values()) for count in counts) / run.eligible,
        entries=entries,
        survived=ticket.survived,
        rows=run.counts,
        eval_rows=run.eval_counts,
        replaced=ticket.replaced,
        **found,
    )


def _dense(run: Run, keep: RunFolder) -> TrainingResult:
    """Train with a method that has no mask."""
    from .dense import difference, train_fully, train_lora

    curve = train_fully(run, keep) if run.options.method == "fft" else train_lora(run, keep)
    vector = difference(run)
    own = sum(len(vector.change(name, *run.owned(name)).touched()) for name in vector)
    entries = int(run.processes.total(np.array([own]))[0])
    return TrainingResult(vector, [], None, curve, {}, None, entries, entries, run.counts, run.eval_counts, None)


def _provenance(request: Request, result: TrainingResult) -> dict[str, Any]:
    """Provenance of the vector, besides the record of the run."""
    options, curve = request.options, result.curve
    return {
        "method": options.method,
        "data": shortened(request.data.name),
        "sparsity": options.sparsity,
        "lr": curve.lr,
        "via_lr": list(result.via_lr),
        "calibration_lr": result.calibration_lr,
        "steps": len(curve.losses),
        "kept_step": curve.kept,
        "final_loss": curve.final_loss,
        "eval_loss": curve.eval_loss,
        **{f"eval_{name}": dict(points).get(curve.kept) for name, points in curve.eval_metrics.items()},
        "survived": result.survived,
        "replaced": result.replaced,
        "unreached": result.unreached,
        "mask_from": _name(request.mask_from),
        "disjoint_from": [shortened(earlier.name) for earlier in request.disjoint_from],
        "start_from": _name(request.start_from),
    }


def _name(vector: TaskVector | None) -> str | None:
    return None if vector is None else shortened(vector.name)
