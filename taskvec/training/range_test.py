"""Learning rate range test (arXiv 1506.01186, section 3.3).

The learning rate starts far below the default and is multiplied by the same factor at each step. After each step, the
loss on some fixed training examples is evaluated. It falls at first, and rises once the steps are too large. The
learning rate found is a fixed fraction of the one with the lowest loss.
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
STEPS = 64  # maximum: the test ends when the loss has risen
_FACTOR = 10 ** (1 / 8)  # ratio of the rates of successive steps
_EXAMPLES = 16  # number of evaluated examples
_RISEN = 1.05  # the test ends above this multiple of the first loss
PART = 0.1  # rate found / rate with the lowest loss


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
        if self.losses[-1] > _RISEN * self.losses[0]:
            control.should_training_stop = True


def find_rate(
    run: Run, model: nn.Module, optimizer_of: Callable[[float], Optimizer], lowest: float, *, dense: bool
) -> float:
    """Train `model` at increasing learning rates and return the learning rate found.

    The model keeps the weights of the last step; the caller restores the start.

    Args:
        run: The run whose data and options are used.
        model: The run's model, or a module that contains it.
        optimizer_of: Creates the optimizer for a learning rate.
        lowest: The first learning rate, which is far too low (`rates.lowest_rate`).
        dense: Whether weights are stored in f32 while the arithmetic may be bf16.

    Raises:
        TrainingError: The loss falls at all learning rates of the range, or at none.
    """
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
        pass  # the losses up to here are sufficient
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
    """Rows to evaluate, drawn by the seed, and rows to train on: the others, or all if there are too few."""
    order = np.random.default_rng(run.options.seed).permutation(len(run.rows)).tolist()
    watched = order[:_EXAMPLES]
    others = order[_EXAMPLES:] if len(order) >= 2 * _EXAMPLES else order
    return [run.rows[i] for i in sorted(watched)], [run.rows[i] for i in sorted(others)]
