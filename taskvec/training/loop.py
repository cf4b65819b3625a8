"""One training phase: transformers' Trainer around an optimizer that somebody else made."""

from __future__ import annotations

import inspect
import math
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)

from ..errors import TrainingError
from ..progress import Progress
from .data import collate


class _Report(TrainerCallback):
    """Passes steps and losses on, and stops at a loss that is not a number."""

    def __init__(self, stage: str, progress: Progress) -> None:
        self.stage = stage
        self.progress = progress
        self.losses: list[float] = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {state.global_step} of {self.stage}; try a lower --lr")
        self.losses.append(loss)
        self.progress(self.stage, state.global_step, state.max_steps, f"loss {loss:.3f}")


def accepted_arguments(model: PreTrainedModel) -> frozenset[str]:
    """Names of the arguments that the model's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def fit(
    model: PreTrainedModel,
    optimizer: Optimizer,
    rows: Sequence[dict[str, list[int]]],
    *,
    stage: str,
    steps: int,
    batch_size: int,
    seed: int,
    clip: float,
    schedule: str,
    warmup_steps: int,
    padding: int,
    device: str,
    progress: Progress,
) -> list[float]:
    """Take `steps` optimizer steps of `batch_size` rows each, in an order drawn from `seed`; return the losses.

    The gradients of the optimizer's own parameters are clipped to the norm `clip` and cleared after each step: the
    Trainer knows only the model's, and sparse leaves are not among them.
    Raises TrainingError where the loss is not finite.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def before_step(*_: object) -> None:
        clip_grad_norm_(parameters, clip)

    handles = [
        optimizer.register_step_pre_hook(before_step),
        optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad()),
    ]
    report = _Report(stage, progress)
    progress(stage, 0, steps, "")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            seed=seed,
            data_seed=seed,
            max_grad_norm=0,
            logging_steps=1,
            logging_nan_inf_filter=False,  # or a NaN loss would be logged as the mean of the losses before it
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=device == "cpu",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=partial(collate, padding=padding, accepts=accepted_arguments(model)),
            optimizers=(optimizer, get_scheduler(schedule, optimizer, warmup_steps, steps)),
            callbacks=[report],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            for handle in handles:
                handle.remove()
    return report.losses
