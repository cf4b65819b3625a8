"""Choice of the mask of a ticket by the criterion of the run, with calibration if the criterion needs it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch

from ..errors import MaskError
from ..models import regrowth
from ..models.placement import values_of
from ..vectors.topk import FloatArray
from .calibration import calibrate
from .criteria import CHANGES, WEIGHTS
from .masking import CHOOSING, Masks, largest, random_mask
from .run import Run

Scores = Callable[[str], FloatArray]


def choose_mask(run: Run, taken: Masks, k: int) -> tuple[Masks, dict[str, object]]:
    """Choose a mask. The weights are those of the start afterwards.

    Args:
        run: The run.
        taken: Positions that stay out of the mask, of those that this process has.
        k: Number of positions.

    Returns:
        The mask, of which each process has its part, and what is noted about the calibration; empty without one.

    Raises:
        MaskError: Fewer than k positions are free and have a score above zero, or a tensor cannot be scored.
        StoppedError: Calibration was interrupted.
        DivergedError: Calibration ended in numbers that are not finite.
    """
    criterion = run.options.criterion
    if not criterion.ranks:
        return random_mask(k, run.forms, taken, run.options.seed, run.kept), {}
    if not criterion.calibrates:
        return _ranked(run, _scores(run, None), taken, k), {}
    observed, curve = calibrate(run)
    idle: set[str] = set()  # tensors of which this process observed only zeros

    def seen(name: str) -> FloatArray:
        values = observed(name)
        if not values.any():
            idle.add(name)
        return values

    masks = _ranked(run, _scores(run, seen), taken, k)
    noted: dict[str, object] = {
        "calibration_losses": curve.losses,
        "calibration_lr": curve.lr,
        "unreached": _unreached(run, idle),
    }
    run.reset()
    return masks, noted


def scores_again(run: Run) -> regrowth.Scores:
    """Return a function that scores the current weights of a parameter, by a criterion that needs no more than these.

    Each tensor on disk is scored separately, as when the mask was chosen.

    Args:
        run: The run.

    Raises:
        MaskError: The function cannot score a tensor. The message names it.
    """
    parameters = list(dict.fromkeys(run.placed[name].parameter for name in run.forms))
    criterion = run.options.criterion

    def scores(parameter: str, weight: torch.Tensor) -> torch.Tensor:
        run.progress(CHOOSING, parameters.index(parameter), len(parameters), "")
        found = torch.empty(weight.numel())
        for name, form in run.forms.items():
            if run.placed[name].parameter != parameter:
                continue
            weights = run.part(name, weight).float().cpu().numpy()
            given = {WEIGHTS: weights.reshape(form.shape), "kept": {}} if criterion.whole else {WEIGHTS: weights}
            run.part(name, found).copy_(torch.from_numpy(_score(run, name, given)))
        return found

    return scores


def _score(run: Run, name: str, given: Mapping[str, Any]) -> FloatArray:
    """Score a tensor by the criterion of the run. Raises MaskError, naming the tensor, if that is not possible."""
    criterion = run.options.criterion
    assert criterion.score is not None
    try:
        return criterion.score(**given, **{option: getattr(run.options, option) for option in criterion.options})
    except MaskError as error:
        raise MaskError(f"tensor {name!r}: {error}") from None


def _scores(run: Run, observed: Scores | None) -> Scores:
    """Return a function that scores a tensor, f32 [owned], from what was observed and from the weights on disk."""
    criterion = run.options.criterion
    observes = criterion.observes
    kept: dict[str, dict[Any, Any]] = {}

    def scores(name: str) -> FloatArray:
        given: dict[str, Any] = {}
        first, stop = run.owned(name)
        if observed is not None and observes is not None:
            given[observes] = observed(name)
        form = run.start.tensors[name]
        if criterion.whole:
            given[WEIGHTS] = values_of(form.dtype, run.start.bits(name)).reshape(form.shape)
            given["kept"] = kept.setdefault(name, {})
        elif WEIGHTS in criterion.needs:
            given[WEIGHTS] = values_of(form.dtype, run.start.bits(name, first, stop))
        found = _score(run, name, given)
        if criterion.whole:
            return found[first:stop]
        if WEIGHTS in given:  # weights that are not numbers cannot be trained
            found[~np.isfinite(given[WEIGHTS])] = 0
        return found

    return scores


def _ranked(run: Run, scores: Scores, taken: Masks, k: int) -> Masks:
    if run.processes.count > 1:
        with run.processes.agreeing():  # while the mask is chosen, no process can fail alone
            for done, name in enumerate(run.forms):
                run.progress("scoring weights", done, len(run.forms), name)
                scores(name)
    first = {name: run.owned(name)[0] for name in run.forms}
    own = {name: held - first[name] for name, held in taken.items()}
    lacking = "weights changed" if run.options.criterion.observes == CHANGES else "have a score above zero"
    found = largest(scores, run.forms, k, run.options.scope, own, run.progress, run.processes, lacking)
    return {name: held + first[name] for name, held in found.items()}


def _unreached(run: Run, idle: Collection[str]) -> float:
    """Share of the eligible weights in tensors of which calibration observed only zeros, in all processes."""
    counts = run.processes.total(np.array([name in idle for name in run.forms], np.int64))
    sizes = (form.size for form in run.forms.values())
    return sum(size for size, parts in zip(sizes, counts, strict=True) if parts == run.processes.shards) / run.eligible
