"""Learning rate range test (arXiv 1506.01186, section 3.3).

The learning rate starts far below the default and is multiplied by the same factor at each step. After each step, the
loss on some fixed training examples is evaluated. It falls at first, stays low over a range of rates, and rises once
the steps are too large. The learning rate found is the one at which that range begins.
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
from .loop import NotFiniteAtStartError, fit
from .run import Run

STAGE = "finding a learning rate"
STEPS = 64  # maximum: the test ends when the loss has risen
_BELOW = 100  # the test starts at the default divided by this
_FACTOR = 10 ** (1 / 8)  # ratio of the rates of successive steps
_NOISE = 4  # steps before the test may end
_EXAMPLES = 16  # number of evaluated examples
_RISEN = 0.5  # the test ends when this share of the fall of the loss is lost again
_REACHED = 0.95  # share of the fall at which the range of low losses begins


class _Stop(TrainerCallback):
    """Callback that stores the evaluation loss of each step, and stops training once it has risen."""

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
        first, lowest = self.losses[0], min(self.losses)
        if len(self.losses) > _NOISE and self.losses[-1] > lowest + _RISEN * (first - lowest):
            control.should_training_stop = True


def find_rate(
    run: Run, model: nn.Module, optimizer_of: Callable[[float], Optimizer], default: float, *, dense: bool
) -> float:
    """Train `model` at increasing learning rates and return the learning rate found.

    The model keeps the weights of the last step; the caller restores the start.

    Args:
        run: The run whose data and options are used.
        model: The run's model, or a module that contains it.
        optimizer_of: Creates the optimizer for a learning rate.
        default: The default learning rate of what trains (`rates`).
        dense: Whether weights are stored in f32 while the arithmetic may be bf16.

    Raises:
        NotFiniteAtStartError: The loss is not finite before the first update.
        TrainingError: The loss falls at all learning rates of the range, or at none.
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
            processes=run.processes,
        )
    except NotFiniteAtStartError:
        raise
    except DivergedError:
        pass  # the losses up to here are sufficient
    finally:
        model.zero_grad(set_to_none=True)
    losses = np.array(stop.losses)
    best = int(losses.argmin()) if len(losses) else 0
    reached = int(np.flatnonzero(losses <= losses[0] - _REACHED * (losses[0] - losses[best]))[0]) if best else 0
    if reached in (0, STEPS - 1):
        raise TrainingError(
            f"the loss {'falls' if reached else 'rises'} at all learning rates from {lowest:.0e} to "
            f"{lowest * _FACTOR ** (STEPS - 1):.0e}: give `lr`"
        )
    return float(f"{lowest * _FACTOR**reached:.2g}")


def _parts(run: Run) -> tuple[list[Row], list[Row]]:
    """Rows to evaluate, drawn by the seed, and rows to train on: the others, or all if there are too few."""
    order = np.random.default_rng(run.options.seed).permutation(len(run.rows)).tolist()
    watched = order[:_EXAMPLES]
    others = order[_EXAMPLES:] if len(order) >= 2 * _EXAMPLES else order
    return [run.rows[i] for i in sorted(watched)], [run.rows[i] for i in sorted(others)]
