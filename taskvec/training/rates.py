"""Default learning rates."""

from __future__ import annotations

from dataclasses import replace

from .options import Rate, TrainingOptions

# Optimizer -> method -> learning rate; calibration uses that of "fft". The rates are the best of grids on a validation
# part of the training data (benchmarks/rates.py; docs/training.md has the tables). AdamW uses those of Adam.
_DEFAULTS = {
    "rmsprop": {"fft": 3e-5, "lora": 3e-4},
    "adam": {"fft": 1e-4, "lora": 3e-3},
    "sgd": {"fft": 1e-1, "lora": 1.0},
}
_DEFAULTS["adamw"] = _DEFAULTS["adam"]
_LOWEST_DENSITY = 0.005  # the rates of sparser masks are not higher (docs/paper.md has the measurements)


def default_rate(method: str, optimizer: str, density: float = 1.0, power: float = 1.0) -> float:
    """Default learning rate of a method (options.METHODS) with an optimizer (options.OPTIMIZERS).

    That of a mask is that of full fine-tuning divided by a power of the density: RMSprop and Adam change each weight by
    about the learning rate, so the fewer weights are trained, the more each may change. Updates of SGD are proportional
    to the gradients, and its rate is the same for every density.

    Args:
        method: What trains; "fft" for calibration.
        optimizer: The optimizer.
        density: Share of the eligible weights that the mask of "lota" contains, in (0, 1]. Below 0.005 the rate is that
            of 0.005. Other methods ignore it.
        power: The power of the density (`criteria.Criterion.rate_power`).
    """
    rates = _DEFAULTS[optimizer]
    if method != "lota":
        return rates[method]
    return rates["fft"] if optimizer == "sgd" else rounded(rates["fft"] / max(density, _LOWEST_DENSITY) ** power)


def rounded(rate: float) -> float:
    """A learning rate in three digits: 3e-05 / (1 - 0.9) is 0.00030000000000000003."""
    return float(f"{rate:.3g}")


def default_of(options: TrainingOptions, density: float = 1.0) -> float:
    """The default learning rate of training.

    Args:
        options: The options of the run. With `via` the mask contains the largest changes of a trained ticket, as it
            does with `mask_from`, whatever criterion chose the mask of the first ticket.
        density: As in `default_rate`.
    """
    power = 1.0 if options.via else options.criterion.rate_power
    return default_rate(options.method, options.optimizer, density, power)


def rate_of(options: TrainingOptions, density: float = 1.0) -> Rate:
    """The learning rate of training: the one given, or the default.

    Args:
        options: The options of the run.
        density: As in `default_rate`.
    """
    return default_of(options, density) if options.lr is None else options.lr


def with_defaults(options: TrainingOptions, *, calibrates: bool) -> TrainingOptions:
    """Fill in the default learning rates of the phases that the run has.

    That of training remains None if the sparsity is that of a given mask, which is known when the model is loaded.

    Args:
        options: The options as given.
        calibrates: Whether the run calibrates.
    """
    lr, calibration_lr, sparsity = options.lr, options.calibration_lr, options.sparsity
    if options.steps != 0 and (options.method != "lota" or sparsity is not None):
        lr = rate_of(options, 1 - (sparsity or 0))
    if calibration_lr is None and calibrates:
        calibration_lr = default_rate("fft", options.optimizer)
    return replace(options, lr=lr, calibration_lr=calibration_lr)
