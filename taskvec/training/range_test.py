"""A learning rate found on the data by a range test (arXiv 1506.01186, section 3.3).

The rate begins far below the default and rises by the same factor at each step. After each step the loss on
some fixed examples of the training data is evaluated: it falls, and rises again where the steps are too large. The rate
found is a fixed part of the one at the lowest loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.rows import Row, pad_id
from ..errors import DivergedError, TrainingError
from .loop import fit
from .optimizers import LeanRMSprop
from .run import Run

STAGE = "finding a learning rate"
STEPS = 64  # at most: the test ends where the loss has risen
_FACTOR = 10 ** (1 / 8)  # from step to step
_BELOW = 100  # times lower than the default is the first rate
_EXAMPLES = 16  # that are evaluated
_RISEN = 1.05  # times the first loss ends the test
PART = 0.1  # of the rate at the lowest loss


class _Stop(TrainerCallback):
    """Keeps the evaluated losses, one a step, and stops where they have risen."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        assert metrics is not None
        self.losses.append(metrics["eval_loss"])
        if self.losses[-1] > _RISEN * self.losses[0]:
            control.should_training_stop = True


def find_rate(
    run: Run, model: nn.Module, optimizer_of: Callable[[float], Optimizer], default: float, *, dense: bool
) -> float:
    """Train `model` at rising rates and return the learning rate found.

    The model is left as it is then, for the caller to reset.

    Args:
        run: Whose data and options are taken.
        model: The run's model, or what holds it.
        optimizer_of: Makes the optimizer for a learning rate.
        default: A hundred times the first rate.
        dense: Whether the weights are f32 beside bf16 arithmetic.

    Raises:
        TrainingError: The loss falls at no rate of the range, or at all of them.
    """
    lowest = default / _BELOW
    optimizer = optimizer_of(lowest)
    watched, rows = _parts(run)
    stop = _Stop()
    options = replace(run.options, eval_steps=1, patience=None, eval_metric=())
    try:
        fit(
            model,
            optimizer,
            rows,
            options,
            stage=STAGE,
            steps=STEPS,
            seed=run.options.seed,
            padding=pad_id(run.tokenizer),
            autocast=run.bf16 and dense,
            progress=run.progress,
            eval_rows=watched,
            scheduler=LambdaLR(optimizer, lambda step: _FACTOR**step),
            callbacks=[stop],
        )
    except DivergedError:
        pass  # the losses before it say enough
    finally:
        if isinstance(optimizer, LeanRMSprop):
            optimizer.close()
        model.zero_grad(set_to_none=True)
    losses = stop.losses
    best = int(np.argmin(losses)) if losses else 0
    if best == 0 or best == STEPS - 1:
        raise TrainingError(
            f"the loss {'falls' if best else 'rises'} at all learning rates from {lowest:.0e} to "
            f"{lowest * _FACTOR ** (STEPS - 1):.0e}: give `lr`"
        )
    return float(f"{PART * lowest * _FACTOR**best:.2g}")


def _parts(run: Run) -> tuple[list[Row], list[Row]]:
    """Rows to watch, drawn by the seed, and those to train on: the others, or all where there are too few."""
    order = np.random.default_rng(run.options.seed).permutation(len(run.rows)).tolist()
    watched = order[:_EXAMPLES]
    others = order[_EXAMPLES:] if len(order) >= 2 * _EXAMPLES else order
    return [run.rows[i] for i in sorted(watched)], [run.rows[i] for i in sorted(others)]
