"""Default learning rates."""

from __future__ import annotations

from dataclasses import replace

from .options import TrainingOptions

# Optimizer -> method -> learning rate; calibration uses that of "fft". Each is the best of a grid on a validation part
# of the training data (benchmarks/rates.py; docs/training.md has the table).
_DEFAULTS = {
    "rmsprop": {"fft": 3e-5, "lora": 1e-4, "lota": 1e-4},
    "adam": {"fft": 3e-5, "lora": 1e-4, "lota": 1e-4},
    "adamw": {"fft": 3e-5, "lora": 1e-4, "lota": 1e-4},
    "sgd": {"fft": 3e-5, "lora": 1e-4, "lota": 1e-4},
}


def default_rate(method: str, optimizer: str) -> float:
    """Default learning rate of a method (options.METHODS) with an optimizer (options.OPTIMIZERS)."""
    return _DEFAULTS[optimizer][method]


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
