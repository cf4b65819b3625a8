"""Optimizers that options can name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

# Run.pull implements weight decay: that of the optimizers would pull calibrated weights to zero, not to the base
_MAKERS: dict[str, Callable[..., Optimizer]] = {
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": partial(torch.optim.AdamW, weight_decay=0),
    "sgd": torch.optim.SGD,
}


def make_optimizer(name: str, parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
    """Create one of options.OPTIMIZERS with torch's defaults and no weight decay. RMSprop's default α is the paper's,
    0.99.
    """
    return _MAKERS[name](parameters, lr=lr)
