"""Default learning rates."""

from __future__ import annotations

from dataclasses import replace

from .options import TrainingOptions

# Optimizer -> method -> learning rate; calibration uses that of "fft". The rates are the best of grids on a validation
# part of the training data (benchmarks/rates.py; docs/training.md has the tables). AdamW uses those of Adam.
_DEFAULTS = {
    "rmsprop": {"fft": 3e-5, "lora": 3e-4, "lota": 3e-4},
    "adam": {"fft": 1e-4, "lora": 3e-3, "lota": 1e-3},
    "sgd": {"fft": 1e-1, "lora": 1.0, "lota": 1e-1},
}
_DEFAULTS["adamw"] = _DEFAULTS["adam"]


def default_rate(method: str, optimizer: str) -> float:
    """Default learning rate of a method (options.METHODS) with an optimizer (options.OPTIMIZERS).

    Args:
        method: What trains; "fft" for calibration.
        optimizer: The optimizer.
    """
    return _DEFAULTS[optimizer][method]


def lowest_rate(method: str, optimizer: str) -> float:
    """The rate at which a search for a learning rate begins: a hundredth of the default."""
    return _DEFAULTS[optimizer][method] / 100


def with_defaults(options: TrainingOptions, *, calibrates: bool) -> TrainingOptions:
    """Fill in the default learning rates of the phases that the run has.

    Args:
        options: The options as given.
        calibrates: Whether the run calibrates.
    """
    lr, calibration_lr = options.lr, options.calibration_lr
    if lr is None and options.steps != 0:
        lr = default_rate(options.method, options.optimizer)
    if calibration_lr is None and calibrates:
        calibration_lr = default_rate("fft", options.optimizer)
    return replace(options, lr=lr, calibration_lr=calibration_lr)
