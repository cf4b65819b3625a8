"""A training phase, run by transformers' Trainer with checkpoints, evaluations and reports."""

from __future__ import annotations

import math
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.pairs import collator_of
from ..data.rows import Row
from ..devices import device_of
from ..errors import DivergedError, ProcessError, StoppedError, UsageError
from ..reporting.progress import Progress
from .lean import LeanRMSprop, TwoPassTrainer
from .options import TrainingOptions
from .processes import Processes
from .trainer import Measure, PhaseTrainer

CALIBRATING, TRAINING = "calibrating", "training"  # stages
_COMPLETE = "complete"


class NotFiniteAtStartError(DivergedError):
    """The loss is not finite before the first update, whatever the learning rate."""


@dataclass(frozen=True)
class Curve:
    """Losses, evaluations and speed of a phase.

    Attributes:
        losses: Loss of each step, nats per token.
        eval_losses: (step, loss) of each evaluation.
        tokens_per_second: Since the phase began or was resumed, without the time of evaluations. Padding is not
            counted, except in packed rows.
        kept: Step whose weights were kept: the last one, or with options.patience the one with the lowest evaluation
            loss.
        eval_metrics: Metric -> (step, value) of each evaluation, for the metrics requested besides the loss.
        lr: Learning rate at the start of the schedule; None if nothing was trained.
    """

    losses: list[float]
    eval_losses: list[tuple[int, float]]
    tokens_per_second: float
    kept: int = 0
    eval_metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    lr: float | None = None

    @property
    def final_loss(self) -> float | None:
        """Loss of the last step that led to the kept weights; None without steps."""
        return self.losses[self.kept - 1] if self.kept else None

    @property
    def eval_loss(self) -> float | None:
        """Evaluation loss of the kept weights; None without evaluations."""
        return dict(self.eval_losses).get(self.kept)

    @property
    def rises(self) -> bool:
        """Whether the mean loss of the last tenth of the kept steps is above that of the first; False if under 10
        steps.
        """
        tenth = self.kept // 10
        first, last = self.losses[:tenth], self.losses[self.kept - tenth : self.kept]
        return sum(last) > sum(first)


class _Watch(TrainerCallback):
    """Callback that reports steps and losses, stops at a loss that is not finite, and stops after the step if
    interrupted.
    """

    def __init__(
        self,
        stage: str,
        folder: Path | None,
        progress: Progress,
        processes: Processes,
        *,
        evaluates: bool = False,
    ) -> None:
        self.processes = processes
        self.trainer: PhaseTrainer | None = None  # without the time that it takes to evaluate
        self.stage = stage
        self.setting = "`calibration_lr`" if stage == CALIBRATING else "`lr`"
        self.evaluates = evaluates
        self.folder = folder
        self.progress = progress
        self.signal: int | None = None  # that stops the training
        self.rate = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began = time.perf_counter()
        self.seen = state.num_input_tokens_seen
        self.progress(self.stage, state.global_step, state.max_steps, "")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs and state.global_step == 1 and not math.isfinite(logs.get("loss", 0.0)):
            raise NotFiniteAtStartError(
                f"the loss is {logs['loss']} before the first step of {self.stage}: the fault is in the model or in a "
                "row of the data, not in the learning rate"
            )
        for key in ("loss", "eval_loss"):
            if logs and key in logs and not math.isfinite(logs[key]):
                kept = _last_checkpoint(self.folder)
                raise DivergedError(
                    f"the {key.replace('_', ' ')} is {logs[key]} at step {state.global_step} of {self.stage}; try a "
                    f"lower {self.setting}" + (f"; the last checkpoint is {kept}" if kept else "")
                )
        if logs and "loss" in logs:
            evaluating = self.trainer.evaluating if self.trainer else 0.0
            self.rate = (state.num_input_tokens_seen - self.seen) / (time.perf_counter() - self.began - evaluating)
            note = f"loss {logs['loss']:.3f}, {self.rate:,.0f} tokens/s"
            self.progress(self.stage, state.global_step, state.max_steps, note)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.evaluates and state.global_step >= state.max_steps:
            control.should_evaluate = True  # the last weights are always evaluated, whatever eval_steps is
        self.signal = self.processes.highest(self.signal or 0) or None  # all processes stop after the same step
        if self.signal is not None:
            control.should_save = self.folder is not None
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint as complete, and remove those before it but the best."""
        self.processes.wait()
        if self.folder is None or not self.processes.is_first:
            return
        last = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        (last / _COMPLETE).touch()
        kept = {last.name, Path(state.best_model_checkpoint or last).name}
        for checkpoint in self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if checkpoint.name not in kept:
                (checkpoint / _COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(checkpoint)


def _last_checkpoint(folder: Path | None) -> Path | None:
    """The last complete checkpoint; a process may be killed while it writes one."""
    found = [] if folder is None else [mark.parent for mark in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


@contextmanager
def _finishing_the_step(watch: _Watch) -> Iterator[None]:
    """Within the block, the first Ctrl-C or SIGTERM stops after the current step; a second one has its usual effect.

    A launcher of several processes passes on a signal that they have got already, so that a second one has no effect:
    it kills them if they do not end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: FrameType | None) -> None:
        watch.signal = number
        if watch.processes.count == 1:
            restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()


@contextmanager
def _naming(folder: Path | None, processes: Processes) -> Iterator[None]:
    """Name the last checkpoint if another process has ended."""
    try:
        with processes.watching():
            yield
    except ProcessError as error:
        kept = _last_checkpoint(folder)
        raise ProcessError(f"{error}; the last checkpoint is {kept}" if kept else str(error)) from error


def check_report_to(name: str) -> None:
    """Check that Trainer can report to an integration.

    Args:
        name: options.report_to.

    Raises:
        UsageError: The integration is unknown, or its package is missing.
    """
    if name != "none":
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise UsageError(f"`report_to={name}`: {error}") from None


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    rows: Sequence[Row],
    options: TrainingOptions,
    *,
    stage: str,
    steps: int,
    seed: int,
    padding: int,
    autocast: bool,
    progress: Progress,
    processes: Processes,
    eval_rows: Sequence[Row] = (),
    measure: Measure | None = None,
    folder: Path | None = None,
    report_to: str = "none",
    scheduler: LambdaLR | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Curve:
    """Take optimizer steps over rows, in an order drawn from `seed`.

    Args:
        model: The model.
        optimizer: The optimizer, whose learning rate is the one at the start of the schedule.
        rows: Rows to train on.
        options: The options of the run.
        stage: Name of the phase, for progress and messages.
        steps: Number of optimizer steps.
        seed: Seed of the order of the rows.
        padding: Token id of padding.
        autocast: Whether to compute in bf16 with f32 weights.
        progress: Called with the stage, the steps done, the steps in all, and a note.
        processes: The processes of the run, which share the model and each batch.
        eval_rows: Rows to evaluate on every options.eval_steps and after the last step. With options.patience, the
            weights of the best evaluation are restored at the end.
        measure: Called at each evaluation, for options.eval_metric.
        folder: Folder for checkpoints every options.save_steps. Training resumes from the last checkpoint in it.
        report_to: An integration of Trainer, or "none".
        scheduler: Schedule of the learning rate, instead of options.schedule.
        callbacks: Further callbacks of Trainer.

    Returns:
        Losses, evaluations and speed.

    Raises:
        NotFiniteAtStartError: The loss is not finite before the first update.
        DivergedError: A later loss is not finite.
        StoppedError: The process received SIGINT or SIGTERM.
        ProcessError: Another process has ended or does not answer.
    """
    if options.gradient_checkpointing:
        # the first name is that of transformers 5.23 and later
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    watch = _Watch(stage, folder, progress, processes, evaluates=bool(eval_rows))
    device = device_of(options.device)
    every = options.eval_steps or max(1, steps // 10)
    best = bool(eval_rows) and options.patience is not None
    save_steps = every if best else options.save_steps  # the best weights are restored from a checkpoint
    with tempfile.TemporaryDirectory() as scratch:
        home = folder or Path(scratch)
        arguments = TrainingArguments(
            output_dir=str(home),
            max_steps=steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulate,
            seed=seed,
            data_seed=seed,
            max_grad_norm=options.clip,
            logging_steps=1,
            logging_nan_inf_filter=False,  # the filter logs a NaN loss as the mean of the losses before it
            include_num_input_tokens_seen="non_padding",
            eval_strategy="steps" if eval_rows else "no",
            eval_steps=every if eval_rows else None,
            prediction_loss_only=True,
            save_strategy="steps" if folder or best else "no",
            save_steps=save_steps,
            load_best_model_at_end=best,
            metric_for_best_model="eval_loss" if eval_rows else None,
            restore_callback_states_from_checkpoint=True,
            report_to=report_to,
            log_level_replica="passive",  # as in the first process
            disable_tqdm=True,
            remove_unused_columns=False,
            bf16=autocast,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        # Trainer takes the first accelerator and splits each batch among all of them: use options.device alone
        arguments._n_gpu = min(arguments.n_gpu, 1)
        if device.index:
            torch.accelerator.set_device_index(device.index)
            arguments.__dict__["_setup_devices"] = device
        all_callbacks: list[TrainerCallback] = [watch, *callbacks]
        if best:
            assert options.patience is not None
            all_callbacks.append(EarlyStoppingCallback(options.patience))
        lr = float(optimizer.param_groups[0]["lr"])
        scheduler = scheduler or get_scheduler(options.schedule, optimizer, options.warmup_steps, steps)
        make = partial(TwoPassTrainer, optimizer) if isinstance(optimizer, LeanRMSprop) else PhaseTrainer
        trainer = watch.trainer = make(
            processes=processes,
            measure=measure,
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=eval_rows or None,
            data_collator=collator_of(model, padding),
            optimizers=(optimizer, scheduler),
            callbacks=all_callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        last = _last_checkpoint(folder)
        with _finishing_the_step(watch), _naming(folder, processes):
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if watch.signal is not None:
        resumed = "; `resume` continues from there" if folder else ""
        where = f"step {trainer.state.global_step:,} of {steps:,} of {stage}"
        raise StoppedError(f"stopped after {where}{resumed}", watch.signal)
    history = trainer.state.log_history
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    eval_losses = [(int(entry["step"]), float(entry["eval_loss"])) for entry in history if "eval_loss" in entry]
    kept = min(eval_losses, key=lambda evaluation: evaluation[1])[0] if best else len(losses)
    metrics = {
        name: [(int(entry["step"]), float(entry[f"eval_{name}"])) for entry in history if f"eval_{name}" in entry]
        for name in (options.eval_metric if measure is not None else ())
    }
    return Curve(losses, eval_losses, watch.rate, kept, metrics, lr)
