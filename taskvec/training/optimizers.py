"""The optimizers that a run can be asked for by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

# a decay would pull calibrated weights to zero, not to the base, and show in the mask
_MAKERS: dict[str, Callable[..., Optimizer]] = {
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": partial(torch.optim.AdamW, weight_decay=0),
    "sgd": torch.optim.SGD,
}


def make_optimizer(name: str, parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
    """One of options.OPTIMIZERS, with torch's own settings (RMSprop's α is the paper's 0.99), without weight decay."""
    return _MAKERS[name](parameters, lr=lr)
