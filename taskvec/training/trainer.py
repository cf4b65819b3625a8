"""Transformers' Trainer for one phase, in one or several processes.

Several processes see the same batches: each takes its share of the rows of every batch, so that a run has the same
steps, on the same examples, whatever the number of processes is. `fully_shard` has divided the model and averages the
gradients of all processes, so the loss of a process is the share of its tokens in the loss of the batch, times their
number. Trainer's own division of data and models, which differs from this, is not used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader  # type: ignore[import-untyped]
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from ..data.rows import IGNORED, Row
from ..models.kinds import is_encoder_decoder, is_masked
from ..models.sharding import discard_copies
from ..models.sparse_model import SparseModel
from .checkpoints import load_mask, load_parts, pieces_of, remove_parts, save_mask, save_part
from .processes import Processes

# returns metric -> value for the current weights
Measure = Callable[[], Mapping[str, float]]
Collator = Callable[[Sequence[Row]], dict[str, Any]]


class PhaseTrainer(Trainer):
    """Trainer whose checkpoints another number of processes can read, and which evaluates further metrics.

    Args:
        processes: The processes of the run.
        measure: Returns the further metrics, if any. They are computed in the same arithmetic, and without drawing
            training's random numbers.
        **options: The arguments of Trainer.

    Attributes:
        evaluating: Seconds that evaluations have taken.
    """

    def __init__(self, processes: Processes, measure: Measure | None = None, **options: Any) -> None:
        self._processes = processes
        self._measures = measure
        self.evaluating = 0.0
        super().__init__(**options)
        self._trained: nn.Module = options["model"]
        dense = self._trained.model if isinstance(self._trained, SparseModel) else self._trained
        self._predicts_next = not (is_masked(dense) or is_encoder_decoder(dense))
        self._whole_batches()
        if processes.count > 1:
            collator: Collator = options["data_collator"]
            self.data_collator = partial(_own_rows, collator=collator, processes=processes)

    def _whole_batches(self) -> None:
        """Have accelerate divide neither the model, which `fully_shard` has done, nor the batches.

        It would wrap the model also if a launcher has started a single process.
        """
        accelerator: Any = self.accelerator
        prepare_model = accelerator.prepare_model
        accelerator.prepare_model = lambda model, **_: prepare_model(
            model, device_placement=False, evaluation_mode=True
        )
        accelerator.prepare_data_loader = lambda loader, **_: prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            use_seedable_sampler=True,
            data_seed=self.args.data_seed,
        )

        def as_in_one(values: torch.Tensor, **_: Any) -> torch.Tensor:
            """The losses of a batch, one per row: each process has that of the whole batch."""
            state = accelerator.gradient_state
            return values[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else values

        accelerator.gather_for_metrics = self.gather_function = as_in_one

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self._processes.count == 1:
            super()._move_model_to_device(model, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the share of these rows in the loss of a step: the mean over the tokens of all its backward passes.

        Trainer passes `num_items_in_batch` to the model, but some models ignore it and return the mean over these rows.
        """
        own = self._trained_tokens(inputs)
        share = own / (self._in_all(own) if num_items_in_batch is None else num_items_in_batch)
        if not own:  # the mean over no tokens is not a number
            inputs = {**inputs, "labels": torch.zeros_like(inputs["labels"])}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if self._trained.training:
            share = share * self._processes.count  # gradients are averaged, and must be added
        return (loss * share, outputs) if return_outputs else loss * share

    def _trained_tokens(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Number of tokens with a loss, as a tensor."""
        labels: torch.Tensor = inputs["labels"]
        return (labels[..., 1:] if self._predicts_next else labels).ne(IGNORED).sum()

    def _in_all(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a number over all processes."""
        total = value.detach().clone()
        if self._processes.count > 1:
            distributed.all_reduce(total)
        return total

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of the whole batch, also if processes share it."""
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        return None if loss is None else self._in_all(loss), logits, labels

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if self._processes.count > 1 and not (inputs["labels"] != IGNORED).any():
            inputs = {"input_ids": inputs["input_ids"], "attention_mask": torch.zeros_like(inputs["input_ids"])}
        super()._track_num_input_tokens(inputs)  # type: ignore[no-untyped-call]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the metrics of Trainer, and those measured here with the prefix "eval_"."""
        began = time.perf_counter()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if self._measures is not None:
            with torch.random.fork_rng(), self.accelerator.autocast():
                found = {f"eval_{name}": value for name, value in self._measures().items()}
            self.log(found)
            metrics |= found
        self.evaluating += time.perf_counter() - began
        return metrics

    # checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Do nothing: the parts of a checkpoint contain the trained values."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._processes.first(lambda: remove_parts(Path(output_dir)))
        save_part(Path(output_dir), pieces_of(self._trained, self._processes), self._plain_optimizer, self._processes)
        if isinstance(self._trained, SparseModel) and self._trained.regrowth is not None:
            state = self._trained.regrowth.state_dict()
            self._processes.first(lambda: save_mask(Path(output_dir), state))
        if self._processes.is_first:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: the values are read together with the state of the optimizer."""

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load(Path(self.state.best_model_checkpoint), with_optimizer=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load(Path(checkpoint), with_optimizer=True)
            assert self.lr_scheduler is not None
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load(self, checkpoint: Path, *, with_optimizer: bool) -> None:
        model = self._trained
        discard_copies(model.model if isinstance(model, SparseModel) else model)
        pieces = pieces_of(model, self._processes)
        with self._processes.agreeing():
            if isinstance(model, SparseModel) and model.regrowth is not None:
                model.regrowth.load_state_dict(load_mask(checkpoint))
            load_parts(checkpoint, pieces, self._plain_optimizer if with_optimizer else None)
        if isinstance(model, SparseModel):
            model.scatter()

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer inside that of accelerate."""
        optimizer: Any = self.optimizer
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return inner


def _own_rows(batch: Sequence[Row], collator: Collator, processes: Processes) -> dict[str, Any]:
    """Collate the rows of a batch that this process takes; if there are none for it, one row that trains nothing."""
    first, stop = (len(batch) * rank // processes.count for rank in (processes.rank, processes.rank + 1))
    if first < stop:
        return collator(batch[first:stop])
    inputs = collator(batch[:1])
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    return inputs
