"""Training of a lottery ticket: calibrate, choose a mask, reset, train the masked weights.

arXiv 2406.16797, Algorithm 1:

1. Calibrate: fine-tune all eligible weights for T steps.
2. Mask: the k = round((1 − s)·N) largest |tuned − base| of all N eligible weights, or another mask (criteria.py).
3. Reset to the base.
4. Sparse fine-tuning: train only the masked weights. With options.regrow_steps the mask changes meanwhile
   (`models.regrowth`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from torch.optim import Optimizer

from taskvec_formats import Form, SparseTensor
from taskvec_formats.sparse import Indices

from ..errors import MaskError
from ..models.sharding import own_part
from ..models.sparse_finetune import sparse_finetune
from ..models.sparse_model import SparseModel
from ..vectors.topk import entries_for
from ..vectors.vector import TaskVector, vector_of
from .choice import choose_mask, scores_again
from .folder import RunFolder
from .loop import Curve
from .masking import Masks, mask_of
from .optimizers import make_optimizer
from .options import AUTO, TrainingOptions
from .range_test import find_rate
from .rates import default_of, rate_of
from .run import Run


@dataclass(frozen=True)
class Ticket:
    """A trained ticket.

    Attributes:
        vector: The task vector relative to the run's start, with k entries, of which each process has its part.
        calibration_losses: Loss of each calibration step; empty without calibration.
        calibration_lr: Learning rate of calibration; None without calibration.
        curve: Losses, evaluations and speed of training.
        survived: Number of entries that change the bits of their weight. The others are rounded away in the dtype of
            the start.
        unreached: Share of eligible weights in tensors that calibration did not change; None without calibration.
        replaced: Number of entries that were replaced during training; None if the mask was fixed.
    """

    vector: TaskVector
    calibration_losses: list[float]
    calibration_lr: float | None
    curve: Curve
    survived: int
    unreached: float | None
    replaced: int | None = None


def train_ticket(run: Run, keep: RunFolder, taken: Masks, mask_from: TaskVector | None) -> Ticket:
    """Train a ticket.

    Args:
        run: The run.
        keep: Folder that stores the mask and checkpoints, so that an interrupted run can be resumed.
        taken: Positions that stay out of the mask, of those that this process has.
        mask_from: Take the mask from this vector, without calibration.

    Raises:
        MaskError: Fewer weights are free, or have changed, than the mask needs.
        StoppedError: Training was interrupted.
        DivergedError: The loss is not finite.
    """
    options = run.options
    k = entries_wanted(options, run.eligible, sum(run.count(taken).values()))

    def choose() -> TaskVector:
        noted: dict[str, object] = {"calibration_losses": [], "calibration_lr": None, "unreached": None}
        if mask_from is not None:
            masks = mask_of(mask_from, run.forms, taken, k, run.kept)
        else:
            assert k is not None
            masks, found = choose_mask(run, taken, k)
            noted |= found
        zeros = {name: _zeros(run.forms[name], indices) for name, indices in masks.items()}
        return vector_of(run.start, run.forms, zeros, noted)

    chosen: TaskVector | None = keep.vector("mask", choose, run.owned)
    assert chosen is not None
    calibration_losses, calibration_lr, unreached = (
        chosen.provenance[name] for name in ("calibration_losses", "calibration_lr", "unreached")
    )
    if not run.steps:  # a mask without values
        vector = vector_of(run.start, run.forms, _own(run, chosen), {}, run.progress)
        return Ticket(vector, calibration_losses, calibration_lr, Curve([], [], 0.0), 0, unreached)
    run.narrow()

    def optimizer_of(tickets: SparseModel, lr: float, *, regrows: bool = False) -> Optimizer:
        optimizer = make_optimizer(options.optimizer, tickets.parameters(), lr)
        if regrows and options.regrow_steps is not None:
            _regrow(run, tickets, optimizer, taken)  # its hook sees the gradients before that of `pull` changes them
        run.pull(optimizer, own_part)
        return optimizer

    density = (k or sum(len(chosen[name].indices) for name in chosen)) / run.eligible

    def find() -> float:
        assert chosen is not None
        default = default_of(options, density)
        with sparse_finetune(run.model, chosen, run.start) as trial:
            found = find_rate(run, trial, partial(optimizer_of, trial), default, dense=False)
        run.reset()
        return found

    lr = keep.number("lr", find) if options.lr == AUTO else rate_of(options, density)
    sparse = sparse_finetune(run.model, chosen, run.start)
    chosen = None  # frees the positions: the leaves store them in half the memory
    with sparse as tickets:
        optimizer = optimizer_of(tickets, float(lr), regrows=True)
        curve = run.phase(tickets, optimizer, steps=run.steps, dense=False, folder=keep.below("checkpoints"))
        deltas = tickets.entries_by_tensor()
        replaced = None if tickets.regrowth is None else tickets.regrowth.replaced
    survived = run.check(deltas)
    vector = vector_of(run.start, run.forms, deltas, {}, run.progress)
    return Ticket(vector, calibration_losses, calibration_lr, curve, survived, unreached, replaced)


def _regrow(run: Run, tickets: SparseModel, optimizer: Optimizer, taken: Masks) -> None:
    """Let the mask change during training, by the options of the run. Taken positions stay out of it."""
    options = run.options
    assert options.regrow_steps is not None
    excluded: dict[str, list[Indices]] = {}
    for name in sorted(taken, key=lambda name: run.placed[name].start):
        place = run.placed[name]
        excluded.setdefault(place.parameter, []).append(taken[name] + place.start)
    by_gradients = options.regrow_rule == "gradients"
    tickets.regrow(
        optimizer,
        total_steps=run.steps,
        every=options.regrow_steps,
        share=options.regrow_share if by_gradients else None,
        window=options.regrow_window if by_gradients else None,
        scores=None if by_gradients else scores_again(run),
        excluded={name: np.concatenate(parts) for name, parts in excluded.items()},
    )


def entries_wanted(options: TrainingOptions, eligible: int, taken: int) -> int | None:
    """Number of entries of the mask, k; None if the whole mask of another vector is used.

    Args:
        options: The options of the run.
        eligible: N, number of eligible weights.
        taken: Number of positions that stay out of the mask.

    Raises:
        MaskError: Fewer than k weights are free.
    """
    k = None if options.sparsity is None else entries_for(options.sparsity, eligible)
    free = eligible - taken
    if free < (k or 1):
        raise MaskError(f"{k or 1:,} entries are wanted but earlier masks leave {free:,} of {eligible:,} weights free")
    return k


def _own(run: Run, vector: TaskVector) -> dict[str, SparseTensor]:
    """The entries of a stored vector that this process has."""
    found = {}
    for name in vector:
        first, stop = run.owned(name)
        part = vector.change(name, first, stop).delta
        found[name] = SparseTensor.owning(run.forms[name].shape, part.indices + first, part.values)
    return found


def _zeros(form: Form, indices: Indices) -> SparseTensor:
    return SparseTensor.owning(form.shape, indices, np.zeros(len(indices), np.float32))
