"""Options of a training run, and the checks on their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

from ..arguments import instance, instances, real, said, truth, whole
from ..data.conversations import TURNS
from ..devices import check_device
from ..errors import UsageError
from ..evaluation.scoring import METRICS
from ..packages import require
from .criteria import CRITERIA, MASKS, Criterion

METHODS = ("lota", "fft", "lora")
SCOPES = ("global", "tensor")
REGROW_RULES = ("gradients", "criterion")
OPTIMIZERS = ("rmsprop", "adam", "adamw", "sgd")
# schedules of transformers' get_scheduler that need no other argument than the number of steps
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
DTYPES = ("float32", "bfloat16")
RELATIVES = ("base", "start")
AUTO = "auto"  # instead of a learning rate: the run finds one
Rate = float | Literal["auto"]
_SEEDS = (1 << 32) - 1  # numpy takes 32 bits, and training draws the order of the data from seed + 1


def _number(what: str, value: object) -> float:
    number = real(what, value)
    return value if type(value) is int and math.isfinite(number) else number


def _rate(what: str, value: object) -> object:
    return value if isinstance(value, str) and value == AUTO else _number(what, value)


def _text(what: str, value: object) -> object:
    instance(what, value, str)
    return value


def _texts(what: str, value: object) -> tuple[str, ...]:
    instances(what, value, str)
    return tuple(value)  # type: ignore[arg-type]  # checked above: a sequence of strings


def _numbers(what: str, value: object) -> tuple[object, ...]:
    several = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_number(what, each) for each in several)


# annotation of a field -> what checks and converts its value
_KINDS: dict[str, Callable[[str, Any], object]] = {
    "int": whole,
    "float": _number,
    "Rate": _rate,
    "str": _text,
    "bool": truth,
    "tuple[str, ...]": _texts,
    "tuple[float, ...]": _numbers,
}


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a training run.

    Attributes:
        method: One of `METHODS`: "lota", a ticket on a mask (arXiv 2406.16797); "fft", full fine-tuning of all
            parameters; "lora", adapters on all linear layers of the blocks, merged into the weights at the end (arXiv
            2106.09685).
        sparsity: s, the share of eligible weights that keep their base value, in (0, 1). If None, the mask has all
            positions of `mask_from`. Must be None for the other methods.
        mask: One of `MASKS`, the criterion that chooses the weights of the mask (`training.criteria`): "magnitude",
            those with the largest changes in calibration, is that of LoTA.
        mask_rank: Rank of the approximations of the weight matrices that `mask="lift"` compares.
        scope: One of `SCOPES`: "global" ranks the weights of all tensors together, "tensor" those of each tensor
            separately.
        via: Increasing sparsities below `sparsity`, or one such number. A ticket of each is trained first, in this
            order, and the mask of the next one contains its entries of largest magnitude. Their learning rates follow
            from `lr` (`training.chain.previous`).
        regrow_steps: Steps of training between changes of the mask (`models.regrowth`). None keeps the mask.
        regrow_rule: One of `REGROW_RULES`, how the mask changes: "gradients" drops the entries with the smallest
            changes, and grows as many where the summed gradients are largest, as SpIEL-AG (arXiv 2401.16405);
            "criterion" chooses the mask of each parameter again by `mask`, from the weights at that time, as LIFT
            (arXiv 2506.00772).
        regrow_share: Share of the entries to replace by gradients, at the start of training, in (0, 1]. It falls
            linearly to zero.
        regrow_window: Steps before each change over which gradients are summed. None is 5, or `regrow_steps` if that is
            less.
        include: Patterns of tensor names. If given, only matching tensors are eligible (`training.targets`).
        exclude: Patterns of tensor names. Matching tensors are not eligible.
        calibration_steps: T, optimizer steps of calibration.
        calibration_epochs: Passes of calibration over the data, used instead of `calibration_steps` if given; 0.1 is
            one pass over a tenth of it.
        low_memory: Calibrate with RMSprop in half the memory and twice the time (`training.lean.LeanRMSprop`).
        steps: Optimizer steps of training. None trains for `epochs`; 0 stores the mask without values.
        epochs: Passes of training over the data. A fraction of a pass is rounded up to whole steps.
        lr: Learning rate of training, with `via` of the last ticket. None uses the default of the method, the optimizer
            and the mask (`training.rates`); "auto" finds one on the data (`training.range_test`).
        calibration_lr: Learning rate of calibration. None uses the default of full fine-tuning with the optimizer;
            "auto" finds one on the data.
        l1: λ, strength of the penalty λ/N · Σ|w − w0| on changes from the start w0, as in LT-SFT (arXiv 2110.07560).
        weight_decay: Decoupled weight decay as in AdamW (arXiv 1711.05101), with any optimizer: before each step,
            weights lose lr·weight_decay times their change from the start. Methods without a mask decay the weight
            matrices themselves instead.
        optimizer: One of `OPTIMIZERS`, for both phases. The paper uses "rmsprop".
        rank: Rank of the LoRA adapters.
        alpha: α of the LoRA adapters.
        batch_size: Examples per backward pass, of all processes together. The last batch of a pass over the data may
            have fewer.
        accumulate: Backward passes per optimizer step. The last step of a pass over the data may have fewer.
        max_length: Maximum number of tokens of an example, or of a row if `pack` is set.
        turns: The assistant's turns of a conversation that the loss is computed on: "all", or the "last".
        pack: Put several examples into one row of at most `max_length` tokens, without attention between them.
            `batch_size` then counts rows.
        clip: Maximum norm of the gradient.
        schedule: One of `SCHEDULES`, of the learning rate. The paper uses "constant".
        warmup_steps: Steps of each phase over which the learning rate rises from zero.
        gradient_checkpointing: Compute activations again in the backward pass instead of storing them.
        eval_split: Share of the data that is held out for evaluation, in [0, 1).
        eval_steps: Steps between evaluations. None evaluates about ten times. The last step is always evaluated.
        patience: Evaluations without a lower loss after which training stops. The weights of the best evaluation are
            kept. None trains to the end and keeps the last weights.
        eval_metric: Metrics of each evaluation besides the loss: "exact_match", "rouge1", or both.
        save_steps: Steps between checkpoints.
        report_to: "none", "tensorboard", "wandb" or another integration of transformers' Trainer.
        seed: Seed of all random choices, such as the order of the data.
        device: "auto", an accelerator if one is available, or a device that `check_device` accepts.
        shards: Number of processes among which the weights are divided, if torchrun or `accelerate launch` has started
            several. It divides their number; each further group of processes has a replica of the weights. None divides
            them among all; 1 gives each process all weights, as DistributedDataParallel does.
        dtype: One of `DTYPES`, of the arithmetic. With "bfloat16", weights are also stored in bf16, except in phases
            that train all weights, which store them in f32.
        relative_to: One of `RELATIVES`: whether the vector of a run that starts from another vector is relative to the
            "base" or to that "start".
        trust_remote_code: Whether Python code from the model folder may run.
    """

    method: str = "lota"
    sparsity: float | None = 0.9
    mask: str = MASKS[0]
    mask_rank: int = 128
    scope: str = "global"
    via: tuple[float, ...] = ()
    regrow_steps: int | None = None
    regrow_rule: str = REGROW_RULES[0]
    regrow_share: float = 0.2
    regrow_window: int | None = None
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
    shards: int | None = None
    dtype: str = "float32"
    relative_to: str = "base"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Convert numbers of numpy and torch to Python's own.

        Raises:
            UsageError: A value has the wrong type.
        """
        for field in fields(self):
            value, (kind, _, optional) = getattr(self, field.name), str(field.type).partition(" | ")
            if value is not None or not optional:
                object.__setattr__(self, field.name, _KINDS[kind](f"`{field.name}`", value))

    @property
    def criterion(self) -> Criterion:
        """The criterion that chooses the mask. `mask` must be one of `MASKS`."""
        return CRITERIA[self.mask]

    def steps_of(self, epochs: float, examples: int) -> int:
        """Number of optimizer steps of some passes over the data.

        Args:
            epochs: Passes over the data. A fraction of a step is rounded up.
            examples: Rows of the data.
        """
        batches = -(-examples // self.batch_size)
        # exact in decimal: 0.07 passes of 100 steps are 7 steps, but 0.07 * 100 > 7 in floating point
        return math.ceil(Fraction(str(epochs)) * -(-batches // self.accumulate))

    def check_warmup(self, rows: int, *, calibrates: bool, packed: bool = False) -> None:
        """Check that the warm-up of each phase ends before the phase does.

        Args:
            rows: Rows to train on.
            calibrates: Whether the run calibrates.
            packed: Whether `rows` counts packed rows. If `pack` is set and they are not packed yet, nothing is checked.

        Raises:
            UsageError: A phase has no more steps than `warmup_steps`.
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

    def check_regrowth(self, rows: int, *, packed: bool = False) -> None:
        """Check that the mask changes before training ends.

        Args:
            rows: Rows to train on.
            packed: As in `check_warmup`.

        Raises:
            UsageError: Training has no more steps than `regrow_steps`.
        """
        if self.regrow_steps is None or (self.pack and not packed):
            return
        steps = self.steps_of(self.epochs, rows) if self.steps is None else self.steps
        if 0 < steps <= self.regrow_steps:
            raise UsageError(f"training takes {steps} steps: `regrow_steps` must be fewer, found {self.regrow_steps}")

    def check(self, *, takes_mask: bool = False) -> None:
        """Check the values of all options and their combinations.

        Args:
            takes_mask: Whether the mask is taken from another vector.

        Raises:
            UsageError: A value is out of range or unknown, or options contradict each other.
        """
        self._check_numbers()
        self._check_choices()
        if takes_mask:
            self._check_taken_mask()
        self._check_combinations()

    def _check_numbers(self) -> None:
        for name, share in [("sparsity", self.sparsity), *(("via", each) for each in self.via)]:
            if share is not None and not 0 < share < 1:
                raise UsageError(f"`{name}` must be between 0 and 1, both excluded; found {said(share)}")
        positive = (
            "calibration_steps calibration_epochs epochs lr calibration_lr rank alpha batch_size accumulate max_length "
            "mask_rank clip eval_steps patience save_steps shards regrow_steps regrow_window"
        ).split()
        for name in positive:
            value = getattr(self, name)
            if value not in (None, AUTO) and not 0 < value < math.inf:
                raise UsageError(f"`{name}` must be greater than zero, found {value}")
        if not 0 < self.regrow_share <= 1:
            raise UsageError(f"`regrow_share` must be above 0 and at most 1, found {said(self.regrow_share)}")
        for name in ("steps", "l1", "weight_decay", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"`{name}` must not be negative, found {value}")
        if not 0 <= self.seed < _SEEDS:
            raise UsageError(f"`seed` must be at least 0 and below {_SEEDS}, found {said(self.seed)}")
        if not 0 <= self.eval_split < 1:
            raise UsageError(f"`eval_split` must be at least 0 and below 1, found {self.eval_split}")

    def _check_choices(self) -> None:
        choices: dict[str, Iterable[str]] = {
            "method": METHODS,
            "mask": MASKS,
            "scope": SCOPES,
            "regrow_rule": REGROW_RULES,
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

    def _check_taken_mask(self) -> None:
        refused = {"mask": MASKS[0], "scope": SCOPES[0], "via": (), "regrow_rule": REGROW_RULES[0]}
        for name, default in refused.items():
            if getattr(self, name) != default:
                raise UsageError(f"`mask_from` takes the mask from another vector: it cannot be combined with `{name}`")

    def _check_combinations(self) -> None:
        if self.method != "lota":
            if self.sparsity is not None or self.via or self.mask != MASKS[0] or self.scope != SCOPES[0]:
                raise UsageError(
                    f"`method={self.method}` has no mask: it takes no `sparsity`, `via`, `mask` or `scope`"
                )
            if self.steps == 0 or self.l1:
                raise UsageError(f"`method={self.method}` does not support `steps=0` or `l1`")
        if not self.criterion.ranks and (self.scope != SCOPES[0] or self.via):
            raise UsageError(
                f"`mask={self.mask}` draws positions from all weights together: it takes no `scope` and no `via`"
            )
        if self.via:
            self._check_via()
        if self.regrow_rule == "criterion" and not self.criterion.weighs:
            able = " or ".join(name for name, row in CRITERIA.items() if row.weighs)
            raise UsageError(
                f"`regrow_rule=criterion` needs a `mask` that is chosen from the weights alone, {able}; "
                f"found {self.mask}"
            )
        if self.regrow_rule == "criterion" and self.via:
            raise UsageError("`regrow_rule=criterion` cannot be combined with `via`, which chooses the mask otherwise")
        if self.regrow_window is not None and self.regrow_steps is not None and self.regrow_window > self.regrow_steps:
            raise UsageError(
                f"`regrow_window` must be at most `regrow_steps`, found window {self.regrow_window}, "
                f"steps {self.regrow_steps}"
            )
        self._check_schedule()
        self._check_low_memory()

    def _check_via(self) -> None:
        if self.sparsity is None:
            raise UsageError("`via` needs `sparsity`")
        if any(later <= earlier for earlier, later in pairwise((*self.via, self.sparsity))):
            raise UsageError(
                "`via` must be lower than `sparsity`, and several must increase; "
                f"found via {', '.join(map(str, self.via))}, sparsity {self.sparsity}"
            )
        if self.steps == 0:
            raise UsageError("`via` trains a ticket first and cannot be used with `steps=0`")

    def _check_schedule(self) -> None:
        if self.schedule == "constant" and self.warmup_steps:
            raise UsageError("`warmup_steps` needs `schedule=constant_with_warmup`, linear or cosine, found constant")
        if self.schedule == "constant_with_warmup" and not self.warmup_steps:
            raise UsageError("`schedule=constant_with_warmup` needs `warmup_steps`")

    def _check_low_memory(self) -> None:
        if not self.low_memory:
            return
        if self.l1 or self.weight_decay:
            raise UsageError("`low_memory` does not support `l1` or `weight_decay`")
        if self.optimizer != "rmsprop":
            raise UsageError(f"`low_memory` needs `optimizer=rmsprop`, found {self.optimizer}")
        if self.accumulate != 1:
            raise UsageError(
                "`low_memory` frees each gradient at once and cannot sum the gradients of several backward passes: "
                f"`accumulate` must be 1, found {self.accumulate}; choose the mask by `steps=0` first, then `mask_from`"
            )


def check_packages(options: TrainingOptions) -> None:
    """Check that the packages that training needs are installed.

    Args:
        options: How to train.

    Raises:
        UsageError: One is not installed.
    """
    require(*(("LoRA", "lora") if options.method == "lora" else ("training", "train")))
    if "rouge1" in options.eval_metric:
        require("the metric rouge1", "eval")
