"""The learning rates of a run: those that are taken where none is given."""

from __future__ import annotations

from dataclasses import replace

from .options import TrainingOptions

# By the optimizer, then by what trains: all weights (full fine-tuning and calibration), adapters, or a mask. Each is
# the best of a grid on a validation part of the training data (benchmarks/rates.py; docs/training.md has the table).
_DEFAULTS = {
    "rmsprop": {"fft": 3e-5, "lora": 1e-4, "lota": 1e-4},
    "adam": {"fft": 3e-5, "lora": 1e-4, "lota": 1e-4},
    "adamw": {"fft": 3e-5, "lora": 1e-4, "lota": 1e-4},
    "sgd": {"fft": 3e-5, "lora": 1e-4, "lota": 1e-4},
}


def default_rate(method: str, optimizer: str) -> float:
    """The learning rate of one of options.METHODS by one of options.OPTIMIZERS, where none is given."""
    return _DEFAULTS[optimizer][method]


def with_defaults(options: TrainingOptions, *, calibrates: bool) -> TrainingOptions:
    """The options with a learning rate for each phase that the run has, and none for a phase that it has not.

    Args:
        options: The options as they were given.
        calibrates: Whether the run calibrates.
    """
    lr, calibration_lr = options.lr, options.calibration_lr
    if lr is None and options.steps != 0:
        lr = default_rate(options.method, options.optimizer)
    if calibration_lr is None and calibrates:
        calibration_lr = default_rate("fft", options.optimizer)
    return replace(options, lr=lr, calibration_lr=calibration_lr)
