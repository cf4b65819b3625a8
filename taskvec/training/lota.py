"""Lottery Ticket Adaptation, arXiv 2406.16797, Algorithm 1.

1. Calibrate: fine-tune all eligible weights for T steps.
2. Mask: the k = round((1 − s)·N) largest |tuned − base| over all N eligible weights together (or as masking.py says).
3. Reset to the base.
4. Sparse fine-tuning: train the masked weights only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import nn

from taskvec_formats import Change, Checkpoint, Form, Header, Identity, SparseTensor, TensorSpec
from taskvec_formats.checkpoint import short

from ..errors import MaskError, TrainingError, UsageError
from ..masks import FloatArray, check_sparsity, entries_for, top_k
from ..progress import Progress, silent
from ..tensor import apply_range
from ..vector import Memory, TaskVector
from .data import encode, pad_id, read_examples
from .leaves import sparse_finetune
from .loop import fit
from .masking import Masks, free_share, mask_of, quotas, random_mask, taken_by, top_k_each
from .models import TORCH_DTYPES, bits_of, eligible_parameters, load_model, tensor_names, values_of

# those of transformers' get_scheduler that need nothing but the number of steps
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
# a decay would pull calibrated weights to zero, not to the base, and show in the mask
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": partial(torch.optim.AdamW, weight_decay=0),
    "sgd": torch.optim.SGD,
}
MASKS = ("magnitude", "random")
SCOPES = ("global", "tensor")


@dataclass(frozen=True)
class Options:
    """How to train.

    sparsity: s, the share of eligible weights that stay at the base, in (0, 1); None takes every position that
        `mask_from` holds.
    mask: "magnitude", the largest changes of calibration; "random", drawn from `seed` without calibration.
    scope: the largest of all weights together, "global", or of each tensor by itself, "tensor".
    calibration_steps: T. steps: optimizer steps of sparse fine-tuning; None takes `epochs` passes over the data.
    lr: learning rate; calibration_lr: that of calibration, None for the same.
    optimizer: one of OPTIMIZERS, for both phases; the paper's is "rmsprop".
    batch_size: examples a step. max_length: tokens an example. clip: largest gradient norm.
    schedule: one of SCHEDULES; the paper's is "constant". warmup_steps: over which the rate rises from zero.
    seed: of the order of the data. device: "auto" (an accelerator where there is one) or "cpu".
    """

    sparsity: float | None = 0.9
    mask: str = "magnitude"
    scope: str = "global"
    calibration_steps: int = 20
    steps: int | None = None
    epochs: float = 3
    lr: float = 1e-4
    calibration_lr: float | None = None
    optimizer: str = "rmsprop"
    batch_size: int = 8
    max_length: int = 1024
    clip: float = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0
    seed: int = 0
    device: str = "auto"

    def check(self) -> None:
        """Raise UsageError for a setting that cannot be meant."""
        if self.sparsity is not None:
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
        choices: dict[str, Iterable[str]] = {
            "mask": MASKS,
            "scope": SCOPES,
            "optimizer": OPTIMIZERS,
            "schedule": SCHEDULES,
            "device": ("auto", "cpu"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name} is one of {', '.join(known)}, found {getattr(self, name)!r}")
        if self.mask == "random" and self.scope != "global":
            raise UsageError("a random mask is drawn from all weights together: --scope tensor needs --mask magnitude")


@dataclass(frozen=True)
class Training:
    """What came out.

    vector: in memory. losses: of both phases, one a step; no calibration losses where the mask needed none.
    free: tensor name -> the share of its weights that neither this mask nor an earlier one holds.
    survived: entries that change the bits of their weight; the others are rounded away in the base's dtype.
    """

    vector: TaskVector
    calibration_losses: list[float]
    losses: list[float]
    free: dict[str, float]
    survived: int

    @property
    def entries(self) -> int:
        """Entries of the mask."""
        return sum(len(self.vector[name]) for name in self.vector)

    @property
    def free_share(self) -> float:
        """The same over all eligible weights."""
        sizes = {name: self.vector.specs[name].size for name in self.free}
        return sum(share * sizes[name] for name, share in self.free.items()) / sum(sizes.values())


def train(
    base: Checkpoint,
    data: Path,
    options: Options,
    progress: Progress = silent,
    *,
    mask_from: TaskVector | None = None,
    disjoint_from: Sequence[TaskVector] = (),
) -> Training:
    """Train a sparse task vector.

    base: the checkpoint of a model folder. data: JSON lines (data.py).
    mask_from: take the mask from this vector, without calibration: all its positions where options.sparsity is None,
        else the k of largest magnitude, which is how iterative LoTA gets a 99 % mask from a 90 % vector.
    disjoint_from: vectors of earlier tasks, whose positions stay out of the mask (LoTTO); k remains what it is.
    The vector has exactly k entries; every other weight of the trained model had the base's bits at the end, and
    applying the vector to the base gives the trained weights to the last bit: both are checked here, tensor by tensor.
    Raises UsageError, DataError, MaskError, TrainingError.
    """
    options.check()
    if mask_from is not None and (options.mask, options.scope) != (MASKS[0], SCOPES[0]):
        raise UsageError("a mask taken from another vector is neither random nor chosen tensor by tensor")
    if mask_from is None and options.sparsity is None:
        raise UsageError("a sparsity is needed where no mask is taken from another vector")
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
    forms = {name: base.tensors[name].form for name in weights}
    eligible = sum(form.size for form in forms.values())
    k = None if options.sparsity is None else entries_for(options.sparsity, eligible)
    taken = taken_by(disjoint_from, forms)
    free = eligible - sum(map(len, taken.values()))
    if free < (k or 1):
        raise MaskError(f"{k or 1} entries are wanted but earlier masks leave {free} of {eligible} weights free")
    _set_to(weights, base)

    def phase(stage: str, trained: list[nn.Parameter], lr: float, count: int, seed: int) -> list[float]:
        return fit(
            model,
            OPTIMIZERS[options.optimizer](trained, lr=lr),
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

    calibration_losses: list[float] = []
    if mask_from is not None:
        masks = mask_of(mask_from, forms, taken, k)
    elif options.mask == "random":
        assert k is not None
        masks = random_mask(k, forms, taken, options.seed)
    else:
        assert k is not None
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
        masks = _largest(weights, base, k, options.scope, taken, progress)
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
        "mask_from": mask_from and mask_from.name,
        "disjoint_from": [vector.name for vector in disjoint_from],
        "steps": steps,
        "final_loss": losses[-1] if losses else None,
    }
    survived = _check(weights, base, deltas, progress)
    vector = _vector(base, forms, deltas, {**provenance, "survived": survived}, progress)
    return Training(vector, calibration_losses, losses, free_share([taken, masks], forms), survived)


def _set_to(weights: dict[str, nn.Parameter], base: Checkpoint) -> None:
    """Give the weights the base's values, from disk: no second copy of the model is kept for the reset."""
    for name, weight in weights.items():
        values = values_of(base.tensors[name].dtype, base.bits(name))
        weight.data.copy_(torch.from_numpy(values).reshape(weight.shape))


def _largest(
    weights: dict[str, nn.Parameter], base: Checkpoint, k: int, scope: str, taken: Masks, progress: Progress
) -> Masks:
    """The largest changes that are not taken; k in all."""

    def delta(name: str) -> FloatArray:
        values = values_of(base.tensors[name].dtype, base.bits(name))
        tuned = weights[name].detach().cpu().numpy().reshape(-1)
        change: FloatArray = (tuned - values).astype(np.float32)
        _check_finite(name, change, "calibration")
        change[taken.get(name, [])] = 0  # a zero is never chosen
        return change

    passes, in_all = count(), (4 if scope == "global" else 1) * len(weights)

    def deltas() -> Iterator[tuple[str, FloatArray]]:
        start = next(passes) * len(weights)
        for done, name in enumerate(weights, start):
            progress("choosing the mask", done, in_all, "")
            yield name, delta(name)

    if scope == "global":
        selection = top_k(deltas, k)
        masks = {name: selection.indices(name, values) for name, values in deltas()}
    else:
        masks = top_k_each(deltas(), quotas(k, {name: weight.numel() for name, weight in weights.items()}))
    progress("choosing the mask", in_all, in_all, "")
    return masks


def _check_finite(name: str, change: FloatArray, stage: str) -> None:
    # the loss shows a step that diverged only at the next step, and the last one has none
    if not np.isfinite(change).all():
        raise TrainingError(f"tensor {name!r}: {stage} ended in weights that are not numbers; try a lower --lr")


def _check(
    weights: dict[str, nn.Parameter], base: Checkpoint, deltas: dict[str, SparseTensor], progress: Progress
) -> int:
    """Prove that base + deltas gives the trained weights; return how many entries change the bits of their weight."""
    survived = 0
    for done, (name, weight) in enumerate(weights.items()):
        progress("checking", done, len(weights), name)
        form = base.tensors[name].form
        delta = (deltas.get(name) or SparseTensor.empty(form.shape)).within(0, form.size)
        _check_finite(name, delta.values, "training")
        none = SparseTensor.empty(delta.shape, form.dtype.carrier)
        tuned = apply_range(form.dtype, base.bits(name), Change(delta, none))
        if not np.array_equal(tuned, bits_of(form.dtype, weight)):
            raise TrainingError(f"tensor {name!r}: base + vector is not what was trained; please report this")
        survived += int(np.count_nonzero(tuned[delta.indices] != base.bits(name)[delta.indices]))
    progress("checking", len(weights), len(weights), "")
    return survived


def _vector(
    base: Checkpoint,
    forms: dict[str, Form],
    deltas: dict[str, SparseTensor],
    provenance: dict[str, object],
    progress: Progress,
) -> TaskVector:
    digests = base.digests(lambda done, total: progress("hashing base", done, total, ""))
    specs = {name: TensorSpec.like(name, form, short(digests[name])) for name, form in forms.items()}
    header = Header("vector", Identity(base.name, base.fingerprint), None, tensors=(), provenance=provenance)
    return TaskVector(header, specs.values(), Memory(deltas, specs), checkpoint=base)
