"""Training a task vector: from a base, data and options to a vector and what is to be said about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec_formats import Checkpoint

from ..applying.overlay import Patched
from ..data.corpus import Corpus, read_corpus
from ..data.examples import check_examples
from ..destination import check_apart
from ..errors import BaseMismatchError, UsageError
from ..models.devices import device_of
from ..reporting.progress import Progress, silent
from ..vectors.diff import diff
from ..vectors.lineage import shortened
from ..vectors.source import inputs_of
from ..vectors.vector import TaskVector
from ..version import __version__
from .effects import check_effects
from .folder import RunFolder
from .masking import free_share
from .options import MASKS, SCOPES, TrainingOptions
from .rates import with_defaults
from .targets import chosen

if TYPE_CHECKING:
    from ..data.rows import RowCounts
    from .loop import Curve
    from .run import Run


@dataclass(frozen=True)
class TrainingResult:
    """What came out.

    vector: in memory. calibration_losses: one a step; none where the mask needed no calibration.
    calibration_lr: its learning rate, None without calibration; that of training is the curve's.
    curve: losses and evaluations of training, and its speed.
    free: tensor name -> the share of its weights that neither this mask nor an earlier one holds; empty without masks.
    free_share: the same of all eligible weights; None without masks.
    entries: of the mask, or of the whole vector where there is none.
    survived: entries that change the bits of their weight; the others are rounded away in the base's dtype.
    rows: what became of the examples to train on; eval_rows: of those held out.
    unreached: the share of eligible weights in tensors that calibration gave no gradient; None without calibration.
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
    """Train a task vector.

    base: the checkpoint of a model folder. data: a file, a folder of files or a Hub id (sources.py).
    mask_from: take the mask from this vector, without calibration: all its positions where options.sparsity is None,
        else the k of largest magnitude.
    disjoint_from: vectors of earlier tasks, whose positions stay out of the mask (LoTTO); k remains what it is.
    start_from: begin at base + this vector; options.relative_to says what the result is added to.
    mix, eval_data: the same, whose examples are mixed in or evaluated on (corpus.py).
    folder: keeps what is needed to go on after an interruption; a run that was interrupted there goes on.
    resume: False starts anew: what is in `folder` is removed once inputs and options were checked.
    A ticket has exactly k entries (relative to where it starts); every other weight of the trained model had the
    start's bits at the end, and applying it gives the trained weights to the last bit: both are checked here, tensor by
    tensor. Raises UsageError, DataError, MaskError, TrainingError, ResumeError, BaseMismatchError.
    """
    check_request(base, options, mask_from, disjoint_from, start_from, eval_data)
    if folder is not None:
        sources = [data, *([] if eval_data is None else [eval_data]), *(path for path, _ in mix)]
        _check_folder(folder, sources, base, [mask_from, start_from, *disjoint_from])
    calibrates = does_calibrate(options, mask_from)
    options = with_defaults(options, calibrates=calibrates)
    corpus = prepare(base, data, options, mix=mix, eval_data=eval_data, calibrates=calibrates)
    from .dense import difference, train_fully, train_lora
    from .ticket import train_ticket

    record: dict[str, Any] = {
        "base": base.fingerprint,
        "data": corpus.files,
        "mix": [share for _, share in mix],
        "options": {name: value for name, value in asdict(options).items() if name not in {"device", "report_to"}},
        "mask_from": mask_from and _identity(mask_from),
        "disjoint_from": [_identity(vector) for vector in disjoint_from],
        "start_from": start_from and _identity(start_from),
        "versions": _versions(),
    }
    denser: TaskVector | None = None
    calibration_losses: list[float] = []
    calibration_lr: float | None = None
    left: float | None
    unreached: float | None
    keep = RunFolder(folder, record, resume=resume)
    with keep:
        if options.via is not None:
            first = replace(
                options, sparsity=options.via, via=None, relative_to="base" if start_from is None else "start"
            )

            def train_denser() -> TaskVector:
                return train(
                    base,
                    data,
                    first,
                    _labelled(progress, f"{first.sparsity:.0%}"),
                    disjoint_from=disjoint_from,
                    start_from=start_from,
                    mix=mix,
                    eval_data=eval_data,
                    folder=keep.below("via"),
                ).vector

            denser = keep.vector("via", train_denser)
        holder = mask_from or denser
        dense = options.method == "fft" or (calibrates and denser is None and not options.low_memory)
        run = open_run(base, corpus, options, progress, start_from=start_from, calibrates=calibrates, dense=dense)
        if options.method == "lota":
            taken = run.taken(disjoint_from)
            ticket = train_ticket(run, keep, taken, holder)
            vector, curve = ticket.vector, ticket.curve
            calibration_losses, calibration_lr = ticket.calibration_losses, ticket.calibration_lr
            masks = {name: vector[name].indices for name in vector}
            entries, survived = sum(map(len, masks.values())), ticket.survived
            unreached = ticket.unreached
            if denser is not None:
                unreached, calibration_lr = (denser.provenance[name] for name in ("unreached", "calibration_lr"))
            free = free_share([taken, masks], run.forms)
            left = 1 - (sum(map(len, taken.values())) + entries) / run.eligible
        else:
            curve = train_fully(run, keep) if options.method == "fft" else train_lora(run, keep)
            vector = difference(run)
            entries = survived = sum(len(vector.change(name).touched()) for name in vector)
            free, left, unreached = {}, None, None
        if start_from is not None and options.relative_to == "base":
            vector = diff(base, Patched(run.start, vector), progress=progress)
    vector.header.provenance.update(
        made_by="train",
        method=options.method,
        data=shortened(data.name),
        examples=len(corpus.train),
        sparsity=options.sparsity,
        lr=curve.lr,
        calibration_lr=calibration_lr,
        steps=len(curve.losses),
        kept_step=curve.kept,
        final_loss=curve.final_loss,
        eval_loss=curve.eval_loss,
        **{f"eval_{name}": dict(points).get(curve.kept) for name, points in curve.eval_metrics.items()},
        survived=survived,
        unreached=unreached,
        mask_from=mask_from and shortened(mask_from.name),
        disjoint_from=[shortened(earlier.name) for earlier in disjoint_from],
        start_from=start_from and shortened(start_from.name),
        run=record,
    )
    return TrainingResult(
        vector=vector,
        calibration_losses=calibration_losses,
        calibration_lr=calibration_lr,
        curve=curve,
        free=free,
        free_share=left,
        entries=entries,
        survived=survived,
        rows=run.counts,
        eval_rows=run.eval_counts,
        unreached=unreached,
    )


def check_request(
    base: Checkpoint,
    options: TrainingOptions,
    mask_from: TaskVector | None,
    disjoint_from: Sequence[TaskVector],
    start_from: TaskVector | None,
    eval_data: Path | None,
) -> None:
    """Raise UsageError or BaseMismatchError for options and arguments of `train` that do not go together."""
    options.check()
    if options.method != "lota" and (mask_from is not None or disjoint_from):
        raise UsageError(f"`method={options.method}` has no mask that could be taken from, or kept off, another vector")
    if mask_from is not None and (options.mask, options.scope, options.via) != (MASKS[0], SCOPES[0], None):
        raise UsageError("a mask taken from another vector is neither random nor calibrated")
    if options.method == "lota" and mask_from is None and options.sparsity is None:
        raise UsageError("a sparsity is needed where no mask is taken from another vector")
    if options.relative_to != "base" and start_from is None:
        raise UsageError("`relative_to=start` needs `start_from`")
    if start_from is not None:
        _check_forms(start_from)
    if eval_data is not None and options.eval_split:
        raise UsageError("`eval_data` and `eval_split` are one or the other")
    if eval_data is not None and options.steps == 0:
        raise UsageError("`eval_data` has no effect here: `steps=0` does not train")
    check_effects(
        options,
        takes_mask=mask_from is not None,
        evaluates=eval_data is not None or bool(options.eval_split),
    )
    chosen(base.tensors, options.include, options.exclude)  # finds a mistyped pattern before a model is loaded


def does_calibrate(options: TrainingOptions, mask_from: TaskVector | None) -> bool:
    """Whether a run has a phase that chooses the mask."""
    return options.method == "lota" and mask_from is None and options.mask != "random"


def prepare(
    base: Checkpoint,
    data: Path,
    options: TrainingOptions,
    *,
    mix: Sequence[tuple[Path, float]],
    eval_data: Path | None,
    calibrates: bool,
) -> Corpus:
    """Read the data of a run, and refuse what can be refused before its model is loaded.

    torch, and then transformers' models, take seconds and memory, so what needs neither comes first.
    """
    corpus = read_corpus(data, mix=mix, eval_data=eval_data, eval_split=options.eval_split, seed=options.seed)
    options.check_warmup(len(corpus.train), calibrates=calibrates)
    from ..models.loading import load_tokenizer

    device_of(options.device)
    load_tokenizer(base.path, trust_remote_code=options.trust_remote_code)
    from .dense import check_peft
    from .loop import check_report_to

    check_report_to(options.report_to)
    if options.method == "lora":
        check_peft()
    return corpus


def open_run(
    base: Checkpoint,
    corpus: Corpus,
    options: TrainingOptions,
    progress: Progress,
    *,
    start_from: TaskVector | None,
    calibrates: bool,
    dense: bool,
) -> Run:
    """Load the model of a run at its start. Raises the errors of `Run`."""
    from .run import Run

    start = base if start_from is None else Patched(base, start_from)
    changed = [] if start_from is None else list(start_from.specs)
    run = Run(start, changed, corpus, options, progress, dense=dense)
    options.check_warmup(len(run.rows), calibrates=calibrates, packed=True)
    return run


def _check_folder(
    folder: Path, sources: Sequence[Path], base: Checkpoint, vectors: Sequence[TaskVector | None]
) -> None:
    """Raise UsageError where an input lies in the folder of the run."""
    files = [file for source in sources for file in check_examples(source)]
    check_apart(folder, [*files, *inputs_of(base, *(vector for vector in vectors if vector is not None))])


def _check_forms(start: TaskVector) -> None:
    """Raise BaseMismatchError for what the model in the base's folder has no room for."""
    reformed = [name for name, spec in start.specs.items() if spec.origin != spec.form]
    for name in (*reformed, *start.header.removed):
        raise BaseMismatchError(f"{start.name} changes the form of tensor {name!r}: unpack it and train from there")


def _identity(vector: TaskVector) -> dict[str, str]:
    return {"name": shortened(vector.name), "digest": vector.digest}


def _versions() -> dict[str, str]:
    import numpy
    import torch
    import transformers

    packages = {"torch": torch, "transformers": transformers, "numpy": numpy}
    return {"taskvec": __version__, **{name: str(package.__version__) for name, package in packages.items()}}


def _labelled(progress: Progress, label: str) -> Progress:
    return lambda stage, done, total, note: progress(f"{label}: {stage}", done, total, note)
