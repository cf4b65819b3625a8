"""Lottery Ticket Adaptation, arXiv 2406.16797, Algorithm 1.

1. Calibrate: fine-tune all eligible weights for T steps.
2. Mask: the k = round((1 − s)·N) largest |tuned − base| over all N eligible weights together.
3. Reset to the base.
4. Sparse fine-tuning: train the masked weights only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import nn

from taskvec_formats import Change, Checkpoint, Header, Identity, SparseTensor, TensorSpec
from taskvec_formats.checkpoint import short
from taskvec_formats.sparse import Indices

from ..errors import TrainingError, UsageError
from ..masks import FloatArray, check_sparsity, entries_for, top_k
from ..progress import Progress, silent
from ..tensor import apply_range
from ..vector import Memory, TaskVector, no_replacements
from .data import encode, pad_id, read_examples
from .leaves import sparse_finetune
from .loop import fit
from .models import TORCH_DTYPES, bits_of, eligible_parameters, load_model, tensor_names, values_of

# those of transformers' get_scheduler that need nothing but the number of steps
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


@dataclass(frozen=True)
class Options:
    """How to train.

    sparsity: s, the share of eligible weights that stay at the base, in (0, 1).
    calibration_steps: T. steps: optimizer steps of sparse fine-tuning; None takes `epochs` passes over the data.
    lr: learning rate; calibration_lr: that of calibration, None for the same.
    batch_size: examples a step. max_length: tokens an example. clip: largest gradient norm.
    schedule: one of SCHEDULES; the paper's is "constant". warmup_steps: over which the rate rises from zero.
    seed: of the order of the data. device: "auto" (an accelerator where there is one) or "cpu".
    """

    sparsity: float = 0.9
    calibration_steps: int = 20
    steps: int | None = None
    epochs: float = 3
    lr: float = 1e-4
    calibration_lr: float | None = None
    batch_size: int = 8
    max_length: int = 1024
    clip: float = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0
    seed: int = 0
    device: str = "auto"

    def check(self) -> None:
        """Raise UsageError for a setting that cannot be meant."""
        check_sparsity(self.sparsity)
        counts = {
            "calibration_steps": self.calibration_steps,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
        }
        if self.steps is not None:
            counts["steps"] = self.steps
        positive = {**counts, "epochs": self.epochs, "lr": self.lr, "clip": self.clip}
        if self.calibration_lr is not None:
            positive["calibration_lr"] = self.calibration_lr
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise UsageError(f"{name.replace('_', '-')} must be greater than zero, found {value}")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"schedule is one of {', '.join(SCHEDULES)}, found {self.schedule!r}")
        if self.device not in ("auto", "cpu"):
            raise UsageError(f"device is auto or cpu, found {self.device!r}")


@dataclass(frozen=True)
class Training:
    """What came out: the vector, in memory, and the losses of both phases, one a step."""

    vector: TaskVector
    calibration_losses: list[float]
    losses: list[float]


def train(base: Checkpoint, data: Path, options: Options, progress: Progress = silent) -> Training:
    """Train a sparse task vector.

    base: the checkpoint of a model folder. data: JSON lines (data.py).
    The vector has exactly k entries; every other weight of the trained model had the base's bits at the end, and
    applying the vector to the base gives the trained weights to the last bit: both are checked here, tensor by tensor.
    Raises UsageError, DataError, MaskError, TrainingError.
    """
    options.check()
    examples = read_examples(data)
    progress("loading", 0, 1, base.name)
    model, tokenizer = load_model(base.path)
    rows = [encode(example, tokenizer, options.max_length) for example in examples]
    progress("loading", 1, 1, "")
    steps = options.steps or max(1, round(options.epochs * len(rows) / options.batch_size))

    parameters = eligible_parameters(model)
    names = tensor_names(model, parameters, base)
    # the canonical order, in which ties are broken, is that of the names on disk
    weights = {names[name]: parameter for name, parameter in sorted(parameters.items(), key=lambda p: names[p[0]])}
    modules = {tensor: name for name, tensor in names.items()}
    k = entries_for(options.sparsity, sum(weight.numel() for weight in weights.values()))
    _set_to(weights, base)

    def phase(stage: str, trained: list[nn.Parameter], lr: float, count: int, seed: int) -> list[float]:
        return fit(
            model,
            torch.optim.RMSprop(trained, lr=lr),
            rows,
            stage=stage,
            steps=count,
            batch_size=options.batch_size,
            seed=seed,
            clip=options.clip,
            schedule=options.schedule,
            warmup_steps=min(options.warmup_steps, count),
            padding=pad_id(tokenizer),
            device=options.device,
            progress=progress,
        )

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    calibration_losses = phase(
        "calibrating",
        list(weights.values()),
        options.calibration_lr or options.lr,
        options.calibration_steps,
        options.seed,
    )
    masks = _masks(weights, base, k, progress)
    _set_to(weights, base)
    model.zero_grad(set_to_none=True)

    stored = {modules[name]: TORCH_DTYPES[base.tensors[name].dtype.name] for name in weights}
    with sparse_finetune(model, {modules[name]: indices for name, indices in masks.items()}, stored) as leaves:
        # another order of the data than calibration saw
        losses = phase("training", leaves.parameters(), options.lr, steps, options.seed + 1)
        deltas = {names[name]: entries for name, entries in leaves.entries().items()}

    provenance = {
        "made_by": "train",
        "method": "lota",
        "data": data.name,
        "examples": len(examples),
        **{name: value for name, value in asdict(options).items() if name != "device"},
        "steps": steps,
        "optimizer": "rmsprop",
        "final_loss": losses[-1] if losses else None,
    }
    vector = _vector(weights, base, deltas, provenance, progress)
    return Training(vector, calibration_losses, losses)


def _set_to(weights: dict[str, nn.Parameter], base: Checkpoint) -> None:
    """Give the weights the base's values, from disk: no second copy of the model is kept for the reset."""
    for name, weight in weights.items():
        values = values_of(base.tensors[name].dtype, base.bits(name))
        weight.data.copy_(torch.from_numpy(values).reshape(weight.shape))


def _masks(weights: dict[str, nn.Parameter], base: Checkpoint, k: int, progress: Progress) -> dict[str, Indices]:
    """tensor name -> the chosen positions; k in all."""

    def delta(name: str) -> FloatArray:
        values = values_of(base.tensors[name].dtype, base.bits(name))
        tuned = weights[name].detach().cpu().numpy().reshape(-1)
        change: FloatArray = (tuned - values).astype(np.float32)
        _check_finite(name, change, "calibration")
        return change

    passes = count()

    def deltas() -> Iterator[tuple[str, FloatArray]]:
        start = next(passes) * len(weights)
        for done, name in enumerate(weights, start):
            progress("choosing the mask", done, 4 * len(weights), "")
            yield name, delta(name)

    selection = top_k(deltas, k)
    masks = {name: selection.indices(name, values) for name, values in deltas()}
    progress("choosing the mask", 4 * len(weights), 4 * len(weights), "")
    return masks


def _check_finite(name: str, change: FloatArray, stage: str) -> None:
    # the loss shows a step that diverged only at the next step, and the last one has none
    if not np.isfinite(change).all():
        raise TrainingError(f"tensor {name!r}: {stage} ended in weights that are not numbers; try a lower --lr")


def _vector(
    weights: dict[str, nn.Parameter],
    base: Checkpoint,
    deltas: dict[str, SparseTensor],
    provenance: dict[str, object],
    progress: Progress,
) -> TaskVector:
    """The vector, after proving that it gives the trained weights."""
    digests = base.digests(lambda done, total: progress("hashing base", done, total, ""))
    specs = {}
    for done, (name, weight) in enumerate(weights.items()):
        progress("checking", done, len(weights), name)
        form = base.tensors[name].form
        spec = TensorSpec.like(name, form, short(digests[name]))
        delta = (deltas.get(name) or SparseTensor.empty(form.shape)).within(0, form.size)
        _check_finite(name, delta.values, "training")
        tuned = apply_range(form.dtype, base.bits(name), Change(delta, no_replacements(spec, form.size)))
        if not np.array_equal(tuned, bits_of(form.dtype, weight)):
            raise TrainingError(f"tensor {name!r}: base + vector is not what was trained; please report this")
        specs[name] = spec
    progress("checking", len(weights), len(weights), "")
    header = Header("vector", Identity(base.name, base.fingerprint), None, tensors=(), provenance=provenance)
    return TaskVector(header, specs.values(), Memory(deltas, specs), checkpoint=base)
