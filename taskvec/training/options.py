"""What can be chosen about a training run, and what cannot be meant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from ..arguments import instance, instances, real, said, whole
from ..data.conversations import TURNS
from ..errors import UsageError
from ..evaluation.scoring import METRICS, check_request
from ..models.devices import check_device
from ..vectors.topk import check_sparsity

METHODS = ("lota", "fft", "lora")
MASKS = ("magnitude", "gradient", "fisher", "random")
SCOPES = ("global", "tensor")
OPTIMIZERS = ("rmsprop", "adam", "adamw", "sgd")
# those of transformers' get_scheduler that need nothing but the number of steps
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
DTYPES = ("float32", "bfloat16")
RELATIVES = ("base", "start")
AUTO = "auto"  # in place of a learning rate: the run finds one
Rate = float | Literal["auto"]
_SEEDS = (1 << 32) - 1  # numpy takes 32 bits, and the order of the data is drawn from the next one


def _number(what: str, value: object) -> float:
    number = real(what, value)
    return value if type(value) is int and math.isfinite(number) else number


def _rate(what: str, value: object) -> object:
    return value if isinstance(value, str) and value == AUTO else _number(what, value)


def _text(what: str, value: object) -> object:
    instance(what, value, str)
    return value


def _truth(what: str, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise UsageError(f"{what} must be True or False, found {said(value)}")
    return bool(value)


def _texts(what: str, value: object) -> tuple[str, ...]:
    instances(what, value, str)
    return tuple(value)  # type: ignore[arg-type]  # a sequence of strings, as has just been checked


# by the annotation of a field
_KINDS: dict[str, Callable[[str, Any], object]] = {
    "int": whole,
    "float": _number,
    "Rate": _rate,
    "str": _text,
    "bool": _truth,
    "tuple[str, ...]": _texts,
}


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    method: "lota"; "fft", all parameters; "lora", adapters on all linear layers of the blocks, merged at the end.
    sparsity: s, the share of eligible weights that stay at the base, in (0, 1); None takes every position that
        `mask_from` holds, and is what the other methods need.
    mask: "magnitude", the largest changes of calibration; "gradient", its largest summed gradients; "fisher", its
        largest sums of squared gradients; "random", drawn from `seed` without calibration.
    scope: the largest of all weights together, "global", or of each tensor by itself, "tensor".
    via: another, lower sparsity: train a ticket of it first, whose largest entries are the mask.
    include, exclude: patterns of tensor names (targets.py), which narrow down the eligible weights.
    calibration_steps: T. calibration_epochs: passes of calibration over the data instead, 0.1 being one over a tenth.
    low_memory: calibrate in half the memory and twice the time, by RMSprop (optimizers.py, LeanRMSprop).
    steps: optimizer steps of training; None takes `epochs` passes over the data, a fraction of a pass rounded up to
        whole steps; 0 leaves a mask without values.
    lr: learning rate of training; calibration_lr: that of calibration. None takes the default for the method and the
        optimizer (rates.py), calibration being full fine-tuning; "auto" finds one on the data (range_test.py).
    l1: λ of the pull towards the base.
    weight_decay: before each step weights lose lr · weight_decay of their change, or, where there is no mask, matrices
        of themselves: as AdamW does it (arXiv 1711.05101), whatever the optimizer.
    optimizer: one of OPTIMIZERS, for both phases; the paper's is "rmsprop".
    rank, alpha: of LoRA.
    batch_size: examples a backward pass; accumulate: backward passes a step. The last of a pass over the data may have
        fewer. max_length: tokens an example.
    turns: the assistant's turns of a conversation that train: "all", or the "last". pack: several examples in one row
        of at most max_length tokens, without attention from one to another; batch_size then counts rows.
    clip: largest gradient norm. schedule: one of SCHEDULES; the paper's is "constant". warmup_steps: over which the
        rate rises from zero, in each phase. gradient_checkpointing: compute activations twice
        instead of keeping them.
    eval_split: share of the data held out; eval_steps: steps between evaluations, None for ten in all; the last step is
        always followed by one. patience: evaluations without a lower loss before training stops and the best weights
        are taken. eval_metric: what is measured at each evaluation beside the loss, "exact_match" or "rouge1" or both.
    save_steps: steps between checkpoints. report_to: "none", "tensorboard", "wandb" or another that Trainer knows.
    seed: of the order of the data. device: "auto" (an accelerator where there is one) or as check_device says.
    dtype: of the arithmetic. Weights that all train are kept in f32 beside bf16 arithmetic; otherwise they are bf16.
    trust_remote_code: whether Python code from the model folder may run.
    relative_to: what the vector is added to where training starts from another vector: the "base", or the "start".
    """

    method: str = "lota"
    sparsity: float | None = 0.9
    mask: str = "magnitude"
    scope: str = "global"
    via: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    calibration_steps: int = 20
    calibration_epochs: float | None = None
    low_memory: bool = False
    steps: int | None = None
    epochs: float = 3
    lr: Rate | None = None
    calibration_lr: Rate | None = None
    l1: float = 0.0
    weight_decay: float = 0.0
    optimizer: str = "rmsprop"
    rank: int = 64
    alpha: int = 16
    batch_size: int = 8
    accumulate: int = 1
    max_length: int = 1024
    turns: str = "all"
    pack: bool = False
    clip: float = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0
    gradient_checkpointing: bool = False
    eval_split: float = 0.0
    eval_steps: int | None = None
    patience: int | None = None
    eval_metric: tuple[str, ...] = ()
    save_steps: int = 100
    report_to: str = "none"
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    relative_to: str = "base"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Numbers of numpy and torch become Python's own. Raises UsageError for a value of another kind."""
        for field in fields(self):
            value, (kind, _, optional) = getattr(self, field.name), str(field.type).partition(" | ")
            if value is not None or not optional:
                object.__setattr__(self, field.name, _KINDS[kind](f"`{field.name}`", value))

    def steps_of(self, epochs: float, examples: int) -> int:
        """Optimizer steps of so many passes over the data; a fraction of a step is taken as a whole one."""
        batches = -(-examples // self.batch_size)
        # as a decimal: 0.07 passes of 100 steps are seven steps, but 0.07 * 100 is above 7 in binary
        return math.ceil(Fraction(str(epochs)) * -(-batches // self.accumulate))

    def check_warmup(self, rows: int, *, calibrates: bool, packed: bool = False) -> None:
        """Raise UsageError where a phase on so many rows would end before the learning rate has risen to its value.

        packed: whether the rows are packed. Where they are going to be, their number is not known before.
        """
        if not self.warmup_steps or (self.pack and not packed):
            return
        phases = {"training": self.steps_of(self.epochs, rows) if self.steps is None else self.steps}
        if calibrates:
            epochs = self.calibration_epochs
            phases["calibration"] = self.calibration_steps if epochs is None else self.steps_of(epochs, rows)
        for phase, steps in phases.items():
            if 0 < steps <= self.warmup_steps:
                raise UsageError(
                    f"{phase} takes {steps} steps: `warmup_steps` must be fewer, found {self.warmup_steps}"
                )

    def check(self) -> None:
        """Raise UsageError for a setting that cannot be meant."""
        for sparsity in (self.sparsity, self.via):
            if sparsity is not None:
                check_sparsity(sparsity)
        self._check_numbers()
        self._check_choices()
        self._check_combinations()

    def _check_numbers(self) -> None:
        positive = (
            "calibration_steps calibration_epochs epochs lr calibration_lr rank alpha batch_size accumulate max_length "
            "clip eval_steps patience save_steps"
        ).split()
        for name in positive:
            value = getattr(self, name)
            if value not in (None, AUTO) and not 0 < value < math.inf:
                raise UsageError(f"`{name}` must be greater than zero, found {value}")
        for name in ("steps", "l1", "weight_decay", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"`{name}` must not be negative, found {value}")
        if not 0 <= self.seed < _SEEDS:
            raise UsageError(f"`seed` must be at least 0 and below {_SEEDS}, found {said(self.seed)}")
        if not 0 <= self.eval_split < 1:
            raise UsageError(f"`eval_split` is a share of the data, at least 0 and below 1, found {self.eval_split}")

    def _check_choices(self) -> None:
        choices: dict[str, Iterable[str]] = {
            "method": METHODS,
            "mask": MASKS,
            "scope": SCOPES,
            "optimizer": OPTIMIZERS,
            "schedule": SCHEDULES,
            "dtype": DTYPES,
            "relative_to": RELATIVES,
            "turns": TURNS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(f"`{name}` is one of {', '.join(known)}, found {getattr(self, name)!r}")
        check_device(self.device)

        for metric in self.eval_metric:
            if metric not in METRICS[1:]:
                raise UsageError(f"`eval_metric` is one of {', '.join(METRICS[1:])}, found {metric!r}")
        if self.eval_metric:
            check_request(self.eval_metric)

    def _check_combinations(self) -> None:
        if self.method != "lota":
            if self.sparsity is not None or self.via is not None or self.mask != MASKS[0] or self.scope != SCOPES[0]:
                raise UsageError(f"`method={self.method}` has no mask: it takes no sparsity and no choice of weights")
            if self.steps == 0 or self.l1:
                raise UsageError(f"`method={self.method}` needs steps, and pulls nothing towards the base")
        if self.mask == "random" and (self.scope != "global" or self.via is not None):
            raise UsageError(
                "a random mask is drawn from all weights together: `scope` and `via` need a calibrated one"
            )
        if self.via is not None and (self.sparsity is None or self.via >= self.sparsity):
            raise UsageError(f"the first ticket of two is the denser one: via {self.via}, sparsity {self.sparsity}")
        if self.via is not None and self.steps == 0:
            raise UsageError("`via` takes the mask from a ticket that it trains first, and needs steps")
        self._check_schedule()
        self._check_low_memory()

    def _check_schedule(self) -> None:
        if self.schedule == "constant" and self.warmup_steps:
            raise UsageError("`warmup_steps` needs `schedule=constant_with_warmup`, linear or cosine, found constant")
        if self.schedule == "constant_with_warmup" and not self.warmup_steps:
            raise UsageError("`schedule=constant_with_warmup` needs `warmup_steps`")

    def _check_low_memory(self) -> None:
        if not self.low_memory:
            return
        if self.l1 or self.weight_decay:
            raise UsageError("low-memory calibration pulls nothing towards the base: no `l1` and no `weight_decay`")
        if self.optimizer != "rmsprop":
            raise UsageError(f"low-memory calibration is by rmsprop, and `optimizer` is {self.optimizer}")
        if self.accumulate != 1:
            raise UsageError(
                "low-memory calibration frees each gradient at once and cannot sum those of several backward passes: "
                f"`accumulate` must be 1, found {self.accumulate}; choose the mask by `steps=0` first, then `mask_from`"
            )
