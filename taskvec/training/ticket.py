"""A lottery ticket: calibrate, mask, reset, train what the mask holds.

arXiv 2406.16797, Algorithm 1:
1. Calibrate: fine-tune all eligible weights for T steps.
2. Mask: the k = round((1 − s)·N) largest |tuned − base| over all N eligible weights together (or as masking.py says).
3. Reset to the base.
4. Sparse fine-tuning: train the masked weights only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from taskvec_formats import Form, SparseTensor
from taskvec_formats.sparse import Indices

from ..errors import MaskError
from ..models.leaves import sparse_finetune
from ..vectors.topk import FloatArray, entries_for
from ..vectors.vector import TaskVector, vector_of
from .calibration import calibrate
from .folder import RunFolder
from .loop import Curve
from .masking import Masks, largest, mask_of, random_mask
from .optimizers import make_optimizer
from .options import AUTO, TrainingOptions
from .range_test import find_rate
from .rates import default_rate
from .run import Run


@dataclass(frozen=True)
class Ticket:
    """vector: relative to the run's start, k entries. calibration_losses: none where no calibration was needed.

    calibration_lr: its learning rate; None without calibration.

    survived: entries that change the bits of their weight; the others are rounded away in the dtype of the start.
    unreached: the share of eligible weights in tensors that calibration left as they were; None without calibration.
    """

    vector: TaskVector
    calibration_losses: list[float]
    calibration_lr: float | None
    curve: Curve
    survived: int
    unreached: float | None


def train_ticket(run: Run, keep: RunFolder, taken: Masks, mask_from: TaskVector | None) -> Ticket:
    """Train a ticket.

    keep: where the mask and checkpoints stay if the run is interrupted. taken: positions that must stay out of the
    mask. mask_from: take the mask from this vector, without calibration.
    Raises MaskError, TrainingError.
    """
    options = run.options
    k = entries_wanted(options, run.eligible, taken)

    def choose() -> TaskVector:
        noted: dict[str, object] = {"calibration_losses": [], "calibration_lr": None, "unreached": None}
        if mask_from is not None:
            masks = mask_of(mask_from, run.forms, taken, k)
        elif options.mask == "random":
            assert k is not None
            masks = random_mask(k, run.forms, taken, options.seed)
        else:
            assert k is not None
            scores, calibration = calibrate(run)
            noted |= {"calibration_losses": calibration.losses, "calibration_lr": calibration.lr}
            idle: set[str] = set()

            def seen(name: str) -> FloatArray:
                values = scores(name)
                if not values.any():
                    idle.add(name)
                return values

            masks = largest(seen, run.forms, k, options.scope, taken, run.progress)
            noted["unreached"] = sum(run.forms[name].size for name in idle) / run.eligible
            run.reset()
        zeros = {name: _zeros(run.forms[name], indices) for name, indices in masks.items()}
        return vector_of(run.start, run.forms, zeros, noted)

    chosen: TaskVector | None = keep.vector("mask", choose)
    assert chosen is not None
    calibration_losses, calibration_lr, unreached = (
        chosen.provenance[name] for name in ("calibration_losses", "calibration_lr", "unreached")
    )
    if not run.steps:  # a mask without values
        zeros = {name: chosen[name] for name in chosen}
        vector = vector_of(run.start, run.forms, zeros, {}, run.progress)
        return Ticket(vector, calibration_losses, calibration_lr, Curve([], [], 0.0), 0, unreached)
    if run.bf16:
        run.model.to(torch.bfloat16)

    def optimizer_of(deltas: Iterable[nn.Parameter], lr: float) -> Optimizer:
        optimizer = make_optimizer(options.optimizer, deltas, lr)
        run.pull(optimizer, lambda delta: delta.detach())
        return optimizer

    def find() -> float:
        assert chosen is not None
        default = default_rate(options.method, options.optimizer)
        with sparse_finetune(run.model, chosen, run.start) as trial:
            found = find_rate(run, trial, partial(optimizer_of, list(trial.parameters())), default, dense=False)
        run.reset()
        return found

    lr = keep.number("lr", find) if options.lr == AUTO else options.lr
    assert lr is not None
    sparse = sparse_finetune(run.model, chosen, run.start)
    chosen = None  # the leaves hold their positions in half the memory
    with sparse as tickets:
        optimizer = optimizer_of(tickets.parameters(), float(lr))
        curve = run.phase(tickets, optimizer, steps=run.steps, dense=False, folder=keep.below("checkpoints"))
        deltas = tickets.entries_by_tensor()
    survived = run.check(deltas)
    vector = vector_of(run.start, run.forms, deltas, {}, run.progress)
    return Ticket(vector, calibration_losses, calibration_lr, curve, survived, unreached)


def entries_wanted(options: TrainingOptions, eligible: int, taken: Masks) -> int | None:
    """k; None where another vector's mask is taken whole. Raises MaskError where fewer weights are free."""
    k = None if options.sparsity is None else entries_for(options.sparsity, eligible)
    free = eligible - sum(map(len, taken.values()))
    if free < (k or 1):
        raise MaskError(f"{k or 1} entries are wanted but earlier masks leave {free} of {eligible} weights free")
    return k


def _zeros(form: Form, indices: Indices) -> SparseTensor:
    return SparseTensor.owning(form.shape, indices, np.zeros(len(indices), np.float32))
