"""Default learning rates."""

from __future__ import annotations

from dataclasses import replace

from ..errors import UsageError
from .options import TrainingOptions

# Method -> learning rate; calibration uses that of "fft". The rates are the best of a grid on a validation part of the
# training data, with RMSprop (benchmarks/rates.py; docs/training.md has the table). Adam and AdamW scale gradients in
# the same way and use them too.
_DEFAULTS = {"fft": 3e-5, "lora": 3e-4, "lota": 3e-4}
_SCALED = {"rmsprop", "adam", "adamw"}  # optimizers whose steps do not depend on the scale of the gradients
_LOWEST = 1e-4  # of a search for another optimizer's rate


def default_rate(method: str, optimizer: str, option: str = "lr") -> float:
    """Default learning rate of a method (options.METHODS) with an optimizer (options.OPTIMIZERS).

    Args:
        method: What trains; "fft" for calibration.
        optimizer: The optimizer.
        option: The option that would set the rate, for the error.

    Raises:
        UsageError: There is no default for the optimizer.
    """
    if optimizer not in _SCALED:
        raise UsageError(f"`optimizer={optimizer}` has no default learning rate: give `{option}`, a number or auto")
    return _DEFAULTS[method]


def lowest_rate(method: str, optimizer: str) -> float:
    """The rate at which a search for a learning rate begins: a hundredth of the default, if there is one."""
    return _DEFAULTS[method] / 100 if optimizer in _SCALED else _LOWEST


def with_defaults(options: TrainingOptions, *, calibrates: bool) -> TrainingOptions:
    """Fill in the default learning rates of the phases that the run has.

    Args:
        options: The options as given.
        calibrates: Whether the run calibrates.

    Raises:
        UsageError: A rate is missing that has no default.
    """
    lr, calibration_lr = options.lr, options.calibration_lr
    if lr is None and options.steps != 0:
        lr = default_rate(options.method, options.optimizer)
    if calibration_lr is None and calibrates:
        calibration_lr = default_rate("fft", options.optimizer, "calibration_lr")
    return replace(options, lr=lr, calibration_lr=calibration_lr)
