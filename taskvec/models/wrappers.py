"""Models inside wrappers: DistributedDataParallel, torch.compile and peft put a module around the model."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import TrainingError


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers.

    Args:
        model: A module, possibly wrapped by DistributedDataParallel, DataParallel, torch.compile or peft.

    Raises:
        TrainingError: The model is quantised: its parameters are not weights of a checkpoint.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    if getattr(model, "quantization_method", None) is not None or getattr(model, "is_quantized", False):
        raise TrainingError(
            f"{type(model).__name__} is quantised: its parameters are not the weights of a checkpoint; load it without "
            "quantisation"
        )
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    inside: object = None
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        inside = model.module
    elif any(kind.__name__ == "PeftModel" for kind in type(model).__mro__):  # peft is optional
        inside = model.get_base_model()  # type: ignore[operator]
    elif hasattr(model, "_orig_mod"):  # of torch.compile
        inside = model._orig_mod
    return inside if isinstance(inside, nn.Module) else None
