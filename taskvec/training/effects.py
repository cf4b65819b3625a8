"""Checks for settings that have no effect in a run, which are refused."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields

from ..errors import UsageError
from .criteria import CRITERIA
from .options import TrainingOptions

_CALIBRATION = "calibration_steps calibration_epochs calibration_lr low_memory"
_CRITERION = " ".join(dict.fromkeys(name for criterion in CRITERIA.values() for name in criterion.options))
_WATCHING = "eval_split eval_steps eval_metric patience save_steps report_to"
_REGROWTH = "regrow_steps regrow_rule regrow_share regrow_window"
_LEARNING = (
    "optimizer l1 weight_decay batch_size accumulate clip schedule warmup_steps max_length turns pack dtype "
    "gradient_checkpointing"
)


def check_effects(
    options: TrainingOptions,
    given: Collection[str] | None = None,
    *,
    takes_mask: bool = False,
    evaluates: bool = False,
    starts_from: bool = False,
) -> None:
    """Check that every setting has an effect.

    Args:
        options: The options of the run.
        given: The fields of `options` that were set explicitly, and "plot" if the losses are to be plotted. None uses
            the fields that differ from their defaults.
        takes_mask: Whether the mask is taken from another vector.
        evaluates: Whether there are examples to evaluate on.
        starts_from: Whether training starts from another vector.

    Raises:
        UsageError: A setting has no effect. The message names it.
    """
    if given is None:
        given = {field.name for field in fields(options) if getattr(options, field.name) != field.default}
    lota, trains = options.method == "lota", options.steps != 0
    criterion, chooses = options.criterion, lota and not takes_mask
    calibrates, draws = chooses and criterion.calibrates, chooses and not criterion.ranks
    by_gradients = options.regrow_rule == "gradients"
    # settings, whether they have an effect, and the end of the message if they have none
    rules = (
        ("rank alpha", options.method == "lora", "without `method=lora`"),
        (f"{_CALIBRATION} {_CRITERION} mask scope l1", lota, f"here: `method={options.method}` has no mask"),
        (_REGROWTH, lota, f"here: `method={options.method}` has no mask"),
        (f"{_CALIBRATION} {_CRITERION} mask scope", not takes_mask, "here: the mask is taken from another vector"),
        (_CALIBRATION, criterion.calibrates, f"here: `mask={options.mask}` needs no calibration"),
        ("scope", criterion.ranks, f"here: `mask={options.mask}` draws positions from all weights together"),
        *((name, name in criterion.options, f"without {_takers(name)}") for name in _CRITERION.split()),
        ("calibration_steps", options.calibration_epochs is None, "together with `calibration_epochs`"),
        ("epochs", options.steps is None, "together with `steps`"),
        ("lr", trains, "here: `steps=0` does not train; `calibration_lr` is the learning rate of calibration"),
        (_REGROWTH, trains, "here: `steps=0` does not train"),
        ("regrow_rule regrow_share regrow_window", options.regrow_steps is not None, "without `regrow_steps`"),
        ("regrow_share regrow_window", by_gradients, f"together with `regrow_rule={options.regrow_rule}`"),
        (_WATCHING, trains, "here: `steps=0` does not train"),
        (f"{_LEARNING} plot", trains or calibrates, "here: nothing is calibrated, and `steps=0` does not train"),
        (
            "seed",
            trains or calibrates or draws,
            "here: nothing is calibrated or drawn, and `steps=0` does not train",
        ),
        ("relative_to", starts_from, "without `start_from`"),
        (
            "eval_steps patience eval_metric",
            evaluates,
            "here: it needs examples to evaluate on, by `eval_split` or `eval_data`",
        ),
        (
            "save_steps",
            options.patience is None,
            "together with `patience`, which saves a checkpoint at each evaluation",
        ),
    )
    for names, effective, why in rules:
        for name in names.split():
            if name in given and not effective:
                raise UsageError(f"`{name}` has no effect {why}")


def _takers(option: str) -> str:
    """The masks that an option is for, as in an error."""
    return " or ".join(f"`mask={row.name}`" for row in CRITERIA.values() if option in row.options)
