"""Plan of a training run: examples, steps, tokens, entries and memory, without training or writing anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from taskvec_formats import Checkpoint

from ..names import layer_and_module
from ..reporting.progress import Progress, silent
from ..reporting.resident import resident
from ..vectors.topk import entries_for
from ..vectors.vector import TaskVector
from .chain import chain, label
from .criteria import Criterion
from .masking import CHOOSING, Masks, mask_of, quotas
from .options import AUTO, Rate, TrainingOptions
from .rates import rate_of
from .request import Request

if TYPE_CHECKING:
    from .footprint import Footprint
    from .run import Run


@dataclass(frozen=True)
class Phase:
    """A phase of a planned run.

    Attributes:
        name: The stage, as passed to the progress callback.
        steps: Number of optimizer steps; 0 if the mask is chosen from the weights alone.
        tokens: Approximate number of tokens seen in all steps, without padding.
        memory: Peak memory in bytes.
        lr: Learning rate at the start of the schedule; None if this phase finds one, or uses one that is found before
            it.
    """

    name: str
    steps: int
    tokens: int
    memory: int
    lr: float | None


@dataclass(frozen=True)
class Layer:
    """Eligible weights of a transformer block.

    Attributes:
        layer: Number of the block; None for tensors outside numbered blocks.
        eligible: Number of eligible weights.
        entries: Number of entries; None if calibration decides.
    """

    layer: int | None
    eligible: int
    entries: int | None


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        examples: Number of rows to train on.
        held_out: Number of rows to evaluate on.
        tokens_per_example: Mean number of tokens per row.
        longest: Tokens of the longest row.
        phases: The phases in their order.
        weights: Number of weights of the model.
        eligible: N, number of eligible weights.
        entries: k, number of entries; None for methods without a mask.
        layers: Eligible weights and entries per block.
        device: Type of the device that would be used, and whose memory is estimated.
        changes: How often the mask changes during training.
    """

    examples: int
    held_out: int
    tokens_per_example: float
    longest: int
    phases: list[Phase]
    weights: int
    eligible: int
    entries: int | None
    layers: list[Layer]
    device: str
    changes: int = 0


def plan(
    base: Checkpoint,
    data: Path,
    options: TrainingOptions,
    progress: Progress = silent,
    *,
    mask_from: TaskVector | None = None,
    disjoint_from: Sequence[TaskVector] = (),
    start_from: TaskVector | None = None,
    mix: Sequence[tuple[Path, float]] = (),
    eval_data: Path | None = None,
) -> Plan:
    """Load the model and the data as `train` does, and return what a run would do.

    Args:
        base: As in `train`.
        data: As in `train`.
        options: As in `train`.
        progress: As in `train`.
        mask_from: As in `train`.
        disjoint_from: As in `train`.
        start_from: As in `train`.
        mix: As in `train`.
        eval_data: As in `train`.

    Returns:
        Examples, steps, tokens, entries and memory.

    Raises:
        TaskvecError: The errors of `train` that are known before training.
    """
    request = Request(base, data, options, mask_from, disjoint_from, start_from, mix, eval_data)
    request.check()
    request = request.with_defaults()
    options, calibrates = request.options, request.calibrates
    corpus = request.prepare()
    from ..devices import device_of
    from .ticket import entries_wanted

    dense = options.method == "fft" or (calibrates and not options.low_memory)
    run = request.open(corpus, progress, dense=dense)
    taken = run.taken(disjoint_from)
    excluded = sum(map(len, taken.values()))
    entries, by_tensor = None, None
    if options.method == "lota":
        # of the first ticket, the densest, first: the others need less
        entries = [entries_wanted(ticket, run.eligible, excluded) for ticket in chain(options)][-1]
        by_tensor = _by_tensor(run, taken, mask_from, entries)
        if entries is None:
            assert by_tensor is not None
            entries = sum(by_tensor.values())
    return Plan(
        examples=run.counts.rows,
        held_out=run.eval_counts.rows,
        tokens_per_example=run.counts.tokens / run.counts.rows,
        longest=min(run.counts.longest, run.counts.limit),
        phases=_phases(run, mask_from=mask_from, calibrates=calibrates, dense=dense, entries=entries),
        weights=sum(parameter.numel() for parameter in run.model.parameters()),
        eligible=run.eligible,
        entries=entries,
        layers=_layers(run, by_tensor),
        device=device_of(options.device).type,
        changes=0 if options.regrow_steps is None else (run.steps - 1) // options.regrow_steps,
    )


def _by_tensor(run: Run, taken: Masks, mask_from: TaskVector | None, k: int | None) -> Mapping[str, int] | None:
    """Number of entries per tensor; None if calibration, a ticket that is trained first, or matrices that would have to
    be approximated first decide.
    """
    options = run.options
    if mask_from is not None:
        return {name: len(mask) for name, mask in mask_of(mask_from, run.forms, taken, k).items()}
    assert k is not None
    if not options.via and not (options.criterion.calibrates or options.criterion.whole):
        from .choice import choose_mask

        masks, _ = choose_mask(run, taken, k)
        return {name: len(mask) for name, mask in masks.items()}
    if options.scope == "tensor" and not options.via:
        return quotas(k, {name: form.size for name, form in run.forms.items()})
    return None


def _layers(run: Run, by_tensor: Mapping[str, int] | None) -> list[Layer]:
    eligible: dict[int | None, int] = {}
    entries: dict[int | None, int] = {}
    for name, form in run.forms.items():
        layer, _ = layer_and_module(name)
        eligible[layer] = eligible.get(layer, 0) + form.size
        entries[layer] = entries.get(layer, 0) + (by_tensor or {}).get(name, 0)
    ordered = sorted(eligible, key=lambda layer: -1 if layer is None else layer)
    return [Layer(layer, eligible[layer], None if by_tensor is None else entries[layer]) for layer in ordered]


def _phases(
    run: Run, *, mask_from: TaskVector | None, calibrates: bool, dense: bool, entries: int | None
) -> list[Phase]:
    from .footprint import POSITION, STATE, WRITTEN, lora_weights
    from .range_test import STAGE, STEPS

    options, found = run.options, []
    state = STATE[options.optimizer]
    footprint = _footprint(run, dense=dense)
    narrow = replace(footprint, width=2 if run.bf16 else 4)
    base_width = max(run.start.tensors[name].dtype.itemsize for name in run.forms)

    def add(name: str, steps: int, kept: int, gradients: int, footprint: Footprint, lr: Rate | None) -> None:
        if not steps:
            return
        memory = footprint.peak(kept=kept, gradients=gradients)
        if lr == AUTO:
            label = name.rpartition(" ")[0]
            before = f"{label} {STAGE}" if label else STAGE
            found.append(Phase(before, STEPS, round(STEPS * run.tokens_a_step), memory, None))
        found.append(
            Phase(name, steps, round(steps * run.tokens_a_step), memory, None if lr in (None, AUTO) else float(lr))
        )

    if options.method == "lota":
        assert entries is not None
        tickets = chain(options)
        labels = [*map(label, tickets[:-1]), ""]
        sizes = [*(entries_for(sparsity, run.eligible) for sparsity in options.via), entries]
        if calibrates:
            n = run.eligible
            sums = 4 * n if options.criterion.sums else 0
            if options.low_memory:
                kept = sums + (4 if run.bf16 else 2) * n
                lean = replace(narrow, accumulates=False, wide_step=False)
                gradients, held = 4 * lean.largest, lean
            else:
                kept, gradients, held = sums + 4 * state * n, 4 * n, footprint
            add(f"{labels[0]}calibrating", run.calibration_steps, kept, gradients, held, options.calibration_lr)
        if options.criterion.memory is not None and mask_from is None:
            kept, scoring = _scoring(run, options.criterion)
            memory = narrow.choosing(kept=kept + POSITION * sizes[0], scoring=scoring)
            found.append(Phase(f"{labels[0]}{CHOOSING}", 0, 0, memory, None))
        for ticket, name, k in zip(tickets, labels, sizes, strict=True):
            kept = (12 + 4 * state + base_width) * k + _regrowing(run, k)
            add(f"{name}training", run.steps, kept, 4 * narrow.largest, narrow, rate_of(ticket, k / run.eligible))
    elif options.method == "fft":
        wanted = {run.placed[name].parameter for name in run.chosen(run.placed)}
        n = sum(parameter.numel() for name, parameter in run.model.named_parameters() if name in wanted)
        add("training", run.steps, 4 * state * n + WRITTEN * n, 4 * n, footprint, options.lr)
    else:
        n = lora_weights(run)
        add("training", run.steps, (4 + 4 * state) * n + WRITTEN * run.eligible, 4 * n, narrow, options.lr)
    return found


def _regrowing(run: Run, k: int) -> int:
    """Bytes that changes of a mask of k entries take during training."""
    options = run.options
    if options.regrow_steps is None:
        return 0
    if options.regrow_rule == "gradients":
        return 16 * k  # of each candidate its position and three numbers
    if options.criterion.memory is not None:
        return _scoring(run, options.criterion)[1]
    return 3 * 4 * max(form.size for form in run.forms.values())  # the weights, their scores and magnitudes of these


def _scoring(run: Run, criterion: Criterion) -> tuple[int, int]:
    """Bytes that a criterion keeps for all tensors, and takes for the largest while it scores it."""
    assert criterion.memory is not None
    options = {name: getattr(run.options, name) for name in criterion.options}
    kept, scoring = zip(*(criterion.memory(form.shape, **options) for form in run.forms.values()), strict=True)
    return sum(kept), max(scoring)


def _footprint(run: Run, *, dense: bool) -> Footprint:
    from ..data.rows import IGNORED
    from ..devices import device_of
    from .footprint import Footprint, activations

    options = run.options
    longest = max(len(row["input_ids"]) for row in run.rows)
    completion = max(sum(label != IGNORED for label in row["labels"]) for row in run.rows) + 1
    size = min(options.batch_size, len(run.rows))
    batch = activations(run, dense=dense).of(size * longest, size * min(completion, longest))
    held = sum(parameter.numel() * parameter.element_size() for parameter in run.model.parameters())
    on_cpu = device_of(options.device).type == "cpu"
    # the weights have just been read: the rest of the resident memory is the program and the data
    process = max(0, (resident() or 0) - held) if on_cpu else 0
    trained = run.model.parameters() if options.method == "fft" else run.parameters().values()
    return Footprint(
        process=process,
        weights=sum(parameter.numel() for parameter in run.model.parameters()),
        width=2 if run.bf16 and not dense else 4,
        largest=max(parameter.numel() for parameter in trained),
        batch=batch,
        accumulates=options.accumulate > 1,
        wide_step=not on_cpu,
    )
