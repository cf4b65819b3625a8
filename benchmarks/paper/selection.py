"""How settings are chosen: by scores on validation parts only. Test parts are not read here."""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import fmean
from typing import Any

from .specs import Merge, Run, Spec, key_of
from .store import Cell, Record
from .worlds import World

Setting = float | dict[str, Any] | None  # a learning rate, options of a merge, or None for the base
Validated = Callable[[Spec, Setting, int], Record]  # the record of a cell with its validation scores


def choose(spec: Spec, world: World, validated: Validated) -> Setting:
    """The setting with the best mean validation score of the tuning seeds.

    The rates of a run are tried from those of the world outwards, until the best has a worse one on each side.

    Args:
        spec: The spec.
        world: The world, with the metric, the seeds and the first rates.
        validated: Returns the record of a spec with a setting and a seed.
    """

    def score(setting: Setting) -> tuple[float, float]:
        return mean_score(spec, setting, world, validated)

    if isinstance(spec, Merge):
        return max((dict(options) for options in spec.search), key=score)
    if isinstance(spec.rate, float):
        return spec.rate
    if spec.rate is not None:
        rate = choose(spec.rate, world, validated)
        assert isinstance(rate, float)
        return float(f"{rate * spec.rate_times:.3g}")
    if (known := world.known_rate(spec)) is not None:
        return known
    wanted = set(world.rates[spec.method])
    scores: dict[float, tuple[float, float]] = {}
    while missing := sorted(wanted - scores.keys()):
        scores |= {rate: score(rate) for rate in missing}
        at = world.grid.index(max(scores, key=lambda rate: scores[rate]))
        wanted |= set(world.grid[max(0, at - 1) : at + 2])
    return max(scores, key=lambda rate: scores[rate])


def mean_score(spec: Spec, setting: Setting, world: World, validated: Validated) -> tuple[float, float]:
    """Mean validation score of a setting, larger is better, and its negative loss, which decides ties.

    A setting with which the training of any seed diverges has the lowest score.
    """
    found = [validated(spec, setting, seed)["validation"] for seed in world.tuning_seeds]
    if not all(found):
        return float("-inf"), float("-inf")
    loss = -fmean(scores["loss"][0] for scores in found)
    return (loss if world.select == "loss" else fmean(scores["exact_match"][0] for scores in found)), loss


def fine_tuning(task: str, steps: int) -> Run:
    """Full fine-tuning on a task from the base, which also gives the learning rate of calibration."""
    return Run(task, (("method", "fft"), ("sparsity", None), ("steps", steps)))


def cell_of(spec: Spec | None, setting: Setting, seed: int) -> Cell:
    """The identity of a cell in the results."""
    return ("base" if spec is None else key_of(spec)), json.dumps(setting), seed
