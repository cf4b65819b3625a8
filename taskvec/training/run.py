"""State that all methods share: a model at its start, its tensors by name, the data as rows, and training phases."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from taskvec_formats import Change, Checkpoint, Form, SparseTensor
from taskvec_formats.sparse import Indices

from ..data.corpus import Corpus
from ..data.packing import check_packing, pack
from ..data.pairs import rows_of
from ..data.rows import first_position, length_limit, pad_id
from ..errors import DivergedError, TrainingError, UsageError
from ..evaluation.evaluate import evaluate
from ..models.divided import load_divided
from ..models.kinds import check_reading, is_masked
from ..models.loading import load_model
from ..models.placement import (
    TORCH_DTYPES,
    eligible_parameters,
    experts_in_lists,
    parameter_at,
    places,
    same_bits,
    tensor_of,
)
from ..models.sharding import discard_copies, own_part, own_range, own_slice
from ..models.sparse_model import SparseModel
from ..reporting.progress import Progress
from ..vectors.delta import apply_range
from ..vectors.vector import TaskVector
from .loop import CALIBRATING, TRAINING, Curve, fit
from .masking import Masks, taken_by
from .options import TrainingOptions
from .processes import Processes
from .targets import chosen as chosen_tensors


class Run:
    """A model that is being trained, and its data.

    If several processes divide the model, each has a range of the elements of every tensor, and of its entries.

    Attributes:
        start: The checkpoint with the initial weights.
        options: The options of the run.
        progress: Called with the stage, the steps done, the steps in all, and a note.
        processes: The processes of the run.
        bf16: Whether the arithmetic is in bf16.
        model: The model, as transformers loads it.
        tokenizer: Its tokenizer.
        rows: The training data as tokens.
        counts: Counts of the training examples.
        held_out: The evaluation examples.
        eval_rows: The evaluation data as tokens.
        eval_counts: Counts of the evaluation examples.
        placed: Tensor name -> Place, for all tensors that the model has.
        layers: Tensor name -> Form, for the tensors of the linear layers.
        forms: Tensor name -> Form, for the eligible tensors: those of `layers` that options.include and options.exclude
            leave. In the order of the names on disk, which decides ties.
    """

    def __init__(
        self,
        start: Checkpoint,
        changed: Iterable[str],
        corpus: Corpus,
        options: TrainingOptions,
        progress: Progress,
        processes: Processes | None = None,
        *,
        dense: bool,
    ) -> None:
        """Load the model and turn the data into rows.

        Args:
            start: The checkpoint with the initial weights.
            changed: Names of the tensors in which `start` differs from the checkpoint in its folder.
            corpus: The examples.
            options: The options of the run.
            progress: Called with the stage, the steps done, the steps in all, and a note.
            processes: The processes of the run; None is this process alone.
            dense: Whether all weights train, and are therefore stored in f32 whatever options.dtype is: most updates
                are too small for bf16 weights.

        Raises:
            TrainingError: The model does not fit its own folder.
            DataError: An example has nothing to learn.
            UsageError: Evaluation metrics are requested of a masked language model.
        """
        self.start = start
        self.options = options
        self.progress = progress
        self.processes = processes or Processes()
        progress("loading", 0, 1, start.name)
        self.bf16 = options.dtype == "bfloat16"
        self._changed = list(changed)
        self.model: nn.Module
        self.model, self.tokenizer = self._load(torch.bfloat16 if self.bf16 and not dense else torch.float32)
        if is_masked(self.model) and options.eval_metric:
            raise UsageError(f"{start.name} is a masked language model and gives no answers: leave `eval_metric` out")
        limit = length_limit(self.model.config, options.max_length, first_position(self.model))
        self.rows, self.counts = rows_of(self.model, corpus.train, self.tokenizer, limit, options.turns)
        # only the loss on the last turn, as in `taskvec eval`
        self.held_out = corpus.held_out
        self.eval_rows, self.eval_counts = rows_of(self.model, corpus.held_out, self.tokenizer, limit, "last")
        check_reading(self.model, self.rows[0])
        if options.pack:
            check_packing(self.model, self.rows, pad_id(self.tokenizer))
            self.rows = pack(self.rows, limit, options.seed)
            self.counts = replace(self.counts, packed=len(self.rows))
        discard_copies(self.model)  # the checks have computed with it
        self.placed = places(self.model, {name: info.form for name, info in start.tensors.items()})
        self.layers = self._layers()
        self.forms = self.layers if options.method == "fft" else {n: self.layers[n] for n in self.chosen(self.layers)}
        if self.processes.mesh is None:
            self.restore(name for name in self._changed if name in self.placed)
        progress("loading", 1, 1, "")

    def _load(self, dtype: torch.dtype) -> tuple[nn.Module, Any]:
        """Load the model and its tokenizer. In one process, the weights are those of the folder."""
        trusted = self.options.trust_remote_code
        if self.processes.mesh is None:
            return load_model(self.start.path, dtype, trust_remote_code=trusted)
        with self.processes.agreeing():
            return load_divided(self.start, self.start.path, dtype, self.processes.mesh, trust_remote_code=trusted)

    def narrow(self) -> None:
        """Store the weights, which are those of the start, in bf16 if the arithmetic is bf16."""
        if not self.bf16:
            return
        if self.processes.mesh is None:
            self.model.to(torch.bfloat16)
        elif next(self.model.parameters()).dtype != torch.bfloat16:
            self.model = nn.Module()  # frees the other one first
            self.model, _ = self._load(torch.bfloat16)

    def chosen(self, names: Collection[str]) -> list[str]:
        """Filter tensor names by options.include and options.exclude.

        Args:
            names: Tensor names.

        Raises:
            UsageError: A pattern matches nothing, or only a part of a parameter would be trained.
        """
        found = chosen_tensors(names, self.options.include, self.options.exclude)
        owners = {self.placed[name].parameter: name for name in found}
        kept = set(found)
        for name in names:
            if name not in kept and (inside := owners.get(self.placed[name].parameter)) is not None:
                raise UsageError(
                    f"tensors {inside!r} and {name!r} are one parameter of the model: "
                    "`include` and `exclude` take both or neither"
                )
        return found

    def taken(self, earlier: Sequence[TaskVector]) -> Masks:
        """Positions of earlier vectors in the eligible tensors, of those that this process has.

        Raises:
            MaskError: A vector belongs to another model.
        """
        return {name: held for name, held in taken_by(earlier, self.layers, self.kept).items() if name in self.forms}

    def owned(self, name: str) -> tuple[int, int]:
        """The range of a tensor's elements that this process has."""
        place, size = self.placed[name], self.start.tensors[name].form.size
        return own_slice(place.parameter, parameter_at(self.model, place.parameter), place.start, size)

    def kept(self, name: str, indices: Indices) -> Indices:
        """Those of a tensor's positions that this process has."""
        low, high = np.searchsorted(indices, self.owned(name))
        return indices[low:high]

    def count(self, masks: Masks) -> dict[str, int]:
        """Number of positions of each eligible tensor in masks, of which each process has its part."""
        own = np.array([len(masks.get(name, ())) for name in self.forms], np.int64)
        return dict(zip(self.forms, self.processes.total(own).tolist(), strict=True))

    def _layers(self) -> dict[str, Form]:
        chosen = eligible_parameters(self.model)
        names = sorted(name for name, place in self.placed.items() if place.parameter in chosen)
        missing = {name: parameter.numel() for name, parameter in chosen.items()}
        for name in names:
            info = self.start.tensors[name]
            if info.dtype.name not in TORCH_DTYPES:
                raise TrainingError(f"tensor {name!r} is {info.dtype.name}, which cannot be trained")
            missing[self.placed[name].parameter] -= info.form.size
        for name, size in missing.items():
            if size:
                raise TrainingError(f"parameter {name!r} has no tensor of its name in {self.start.name}")
        return {name: self.start.tensors[name].form for name in names}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameter name -> Parameter, for the parameters that contain eligible tensors."""
        wanted = {self.placed[name].parameter for name in self.forms}
        return {name: parameter for name, parameter in self.model.named_parameters() if name in wanted}

    @property
    def eligible(self) -> int:
        """N, the number of eligible weights."""
        return sum(form.size for form in self.forms.values())

    def weight(self, name: str) -> torch.Tensor:
        """Current values of a tensor in the model, of those that this process has: a flat view, [owned]."""
        return self.part(name, own_part(parameter_at(self.model, self.placed[name].parameter)))

    def part(self, name: str, own: torch.Tensor) -> torch.Tensor:
        """The elements of a tensor in what this process has of its parameter: a flat view, [owned]."""
        place, (first, stop) = self.placed[name], self.owned(name)
        low, _ = own_range(place.parameter, parameter_at(self.model, place.parameter))
        return own.view(-1)[place.start + first - low : place.start + stop - low]

    def started(self, name: str) -> torch.Tensor:
        """Initial values of a tensor, of those that this process has, read from disk: [owned], in the dtype there."""
        return tensor_of(self.start.tensors[name].dtype, self.start.bits(name, *self.owned(name)))

    def moved(self, parameter: str) -> torch.Tensor:
        """Difference of a parameter from its initial values, of what this process has, in its shape and dtype."""
        change = own_part(self.model.get_parameter(parameter)).clone()
        for name in self.forms:
            if self.placed[name].parameter == parameter:
                part = self.part(name, change)
                part.sub_(self.started(name).to(part))
        return change

    def _set(self, name: str) -> None:
        self.weight(name).copy_(self.started(name))

    def reset(self) -> None:
        """Restore the initial values of the eligible weights from disk, so that no second copy of the model is kept in
        memory.
        """
        self.restore(self.forms)

    def restore(self, names: Iterable[str]) -> None:
        """Restore the initial values of some tensors."""
        for name in names:
            self._set(name)

    def steps_of(self, epochs: float) -> int:
        """Number of optimizer steps of some passes over the data, at least one."""
        return self.options.steps_of(epochs, len(self.rows))

    @property
    def steps(self) -> int:
        """Number of optimizer steps of training."""
        return self.steps_of(self.options.epochs) if self.options.steps is None else self.options.steps

    @property
    def calibration_steps(self) -> int:
        """Number of optimizer steps of calibration."""
        epochs = self.options.calibration_epochs
        return self.options.calibration_steps if epochs is None else self.steps_of(epochs)

    @property
    def tokens_a_step(self) -> float:
        """Mean number of tokens per step in a pass over the data, whose last batch and step may be smaller."""
        batches = math.ceil(len(self.rows) / self.options.batch_size)
        return self.counts.tokens / math.ceil(batches / self.options.accumulate)

    def phase(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        steps: int,
        dense: bool,
        calibrates: bool = False,
        folder: Path | None = None,
    ) -> Curve:
        """Run a training phase.

        Args:
            model: This run's model, or a module that contains it.
            optimizer: The optimizer of the parameters to train.
            steps: Number of optimizer steps.
            dense: Whether weights are stored in f32 while the arithmetic may be bf16.
            calibrates: Whether this is calibration, which has no checkpoints, evaluations or reports.
            folder: Folder for checkpoints of the main phase.

        Returns:
            Losses, evaluations and speed of the phase.
        """
        options = self.options
        if self.processes.count > 1:
            self._skip_unused(model, optimizer)
        curve = fit(
            model,
            optimizer,
            self.rows,
            options,
            stage=CALIBRATING if calibrates else TRAINING,
            steps=steps,
            # a different order of the data than in calibration
            seed=options.seed + (not calibrates),
            padding=pad_id(self.tokenizer),
            autocast=self.bf16 and dense,
            progress=self.progress,
            eval_rows=() if calibrates else self.eval_rows,
            measure=self._measure if self.options.eval_metric and not calibrates else None,
            folder=folder,
            report_to="none" if calibrates else options.report_to,
            processes=self.processes,
        )
        discard_copies(self.model)
        return curve

    def _skip_unused(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Let the optimizer skip experts that no token of a step was routed to, as it does in one process.

        If processes divide the model, the gradients of such experts are zero instead of missing (`models.divided`).
        """
        experts = {id(parameter) for each in experts_in_lists(self.model) for parameter in each.parameters()}
        if isinstance(model, SparseModel):
            trained = [leaf.delta for leaf in model.leaves.values() if id(leaf.weight) in experts]
        else:
            trained = [parameter for parameter in model.parameters() if id(parameter) in experts]
        if not trained:
            return

        def skip(*_: object) -> None:
            held = [parameter for parameter in trained if parameter.grad is not None]
            if held:
                sizes = torch.stack(
                    [own_part(parameter.grad).abs().sum() for parameter in held if parameter.grad is not None]
                )
                for parameter, size in zip(held, self.processes.add(sizes).tolist(), strict=True):
                    if size == 0:
                        parameter.grad = None

        optimizer.register_step_pre_hook(skip)

    def _measure(self) -> dict[str, float]:
        """Values of options.eval_metric for the current weights."""
        found = evaluate(
            self.model,  # type: ignore[arg-type]  # a model of transformers
            self.tokenizer,
            self.held_out,
            self.options.eval_metric,
            batch_size=self.options.batch_size,
            max_length=self.options.max_length,
            progress=self.progress,
        )
        return {name: metric.value for name, metric in found.metrics.items()}

    def pull(self, optimizer: Optimizer, moved: Callable[[nn.Parameter], torch.Tensor]) -> None:
        """Pull weights back towards the start before each step, with options.l1 and options.weight_decay.

        l1 adds the gradient of λ/N·Σ|w − w0|, as in LT-SFT (arXiv 2110.07560). Weight decay subtracts lr·decay·(w − w0)
        from the weights, separately from the gradient, as in AdamW (arXiv 1711.05101).

        Args:
            optimizer: The optimizer to register the hook on.
            moved: Returns w − w0 of what this process has of a parameter of the optimizer, in its shape.
        """
        strength, decay = self.options.l1 / self.eligible, self.options.weight_decay
        if not (strength or decay):
            return

        @torch.no_grad()
        def back(*_: object) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        change = moved(parameter)
                        if strength:
                            own_part(parameter.grad).add_(change.sign(), alpha=strength)
                        if decay:
                            own_part(parameter).sub_(change, alpha=group["lr"] * decay)

        optimizer.register_step_pre_hook(back)

    def check(self, deltas: dict[str, SparseTensor]) -> int:
        """Verify that start + deltas gives the trained weights bit for bit.

        Args:
            deltas: Tensor name -> entries, of those that this process has.

        Returns:
            The number of entries that change the bits of their weight, in all processes.

        Raises:
            TrainingError: The sum differs from the trained weights.
            DivergedError: A delta is not finite.
        """
        survived = 0
        with self.processes.agreeing():
            for done, (name, form) in enumerate(self.forms.items()):
                self.progress("checking", done, len(self.forms), name)
                survived += self._check(name, form, deltas.get(name) or SparseTensor.empty((form.size,)))
        self.progress("checking", len(self.forms), len(self.forms), "")
        return int(self.processes.total(np.array([survived]))[0])

    def _check(self, name: str, form: Form, delta: SparseTensor) -> int:
        """Verify the trained weights of a tensor, as in `check`."""
        if not np.isfinite(delta.values).all():
            raise DivergedError(f"tensor {name!r}: training ended in weights that are not numbers; try a lower `lr`")
        first, stop = self.owned(name)
        delta = delta.slice_range(first, stop)
        before, weight = self.start.bits(name, first, stop), self.weight(name).cpu()
        after = apply_range(form.dtype, before, Change(delta, SparseTensor.empty(delta.shape, form.dtype.carrier)))
        expected = tensor_of(form.dtype, after).to(weight.dtype)
        if not same_bits(expected, weight):
            raise TrainingError(f"tensor {name!r}: start + vector is not what was trained; please report this")
        return int(np.count_nonzero(after[delta.indices] != before[delta.indices]))
