"""Reads results: scores of rows by case and seed, and means over them with standard errors. Computes no cell."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from .compute import task_of
from .selection import Setting, cell_of, choose, mean_score
from .specs import Run, Spec
from .store import Record, Store
from .tables import Row
from .worlds import World


class MissingError(Exception):
    """A cell has not been computed."""


@dataclass(frozen=True)
class Mean:
    """A mean over cases and seeds, and its standard error; None if it is not known."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.value:.1f}" + ("" if self.error is None else f" ± {self.error:.1f}")


def mean_of(cases: Sequence[Sequence[float]], errors: Sequence[float | None] = ()) -> Mean:
    """The mean over cases of the means over seeds.

    The standard error is that of the seeds: √(Σ s² / n) / C for C cases of n seeds with variance s². The cases are
    fixed, so their differences are not part of it. With one seed it is that of the errors of the cases.

    Args:
        cases: For each case, one value per seed.
        errors: For each case, the standard error over test examples.
    """
    value = fmean(fmean(seeds) for seeds in cases)
    if min(map(len, cases)) < 2:
        return Mean(value, error_of_mean(errors))
    return Mean(value, math.sqrt(sum(variance(seeds) / len(seeds) for seeds in cases)) / len(cases))


class Results:
    """The results of a world.

    Args:
        world: The world.
        store: Its results.
    """

    def __init__(self, world: World, store: Store) -> None:
        self.world = world
        self.store = store

    def validated(self, spec: Spec, setting: Setting, seed: int) -> Record:
        """The record of a cell with its validation scores.

        Raises:
            MissingError: It is not in the results.
        """
        found = self.store.cell(cell_of(spec, setting, seed))
        if found is None:
            raise MissingError(f"{json.dumps(setting)}, seed {seed}")
        return found

    def choice(self, spec: Spec | None) -> Setting:
        """The setting that is chosen for a spec by its validation scores."""
        return None if spec is None else choose(spec, self.world, self.validated)

    def validation(self, spec: Spec) -> float:
        """Mean validation score of a spec with its chosen setting."""
        tuned = spec.rate if isinstance(spec, Run) and isinstance(spec.rate, Run) else spec
        return mean_score(tuned, self.choice(tuned), self.world, self.validated)[0]

    def tested(self, spec: Spec | None, task: str, metric: str) -> list[float]:
        """The scores of a spec on the test part of a task, one per seed, in percent for exact match.

        Raises:
            MissingError: One of them is not in the results.
        """
        setting, seeds = self.choice(spec), self.world.seeds if spec is not None else (0,)
        records = [self.store.test(cell_of(spec, setting, seed), task) for seed in seeds]
        if None in records:
            raise MissingError(f"{task}, seed {seeds[records.index(None)]}")
        if any(metric not in record for record in records if record is not None):
            raise MissingError(f"{metric} on {task}: a seed diverged")
        return [_scale(metric) * record[metric][0] for record in records if record is not None]

    def sampled(self, spec: Spec | None, task: str, metric: str) -> float | None:
        """The standard error of the score over the test examples, in a world with one seed; else None."""
        (seed, *others) = self.world.seeds
        record = None if others else self.store.test(cell_of(spec, self.choice(spec), seed), task)
        return None if record is None or record[metric][1] is None else _scale(metric) * record[metric][1]

    def trained(self, spec: Spec, name: str) -> float:
        """Mean over the seeds of a figure of the training records, such as "bytes"."""
        setting = self.choice(spec)
        return fmean(self.validated(spec, setting, seed)[name] for seed in self.world.seeds)


def error_of_mean(errors: Sequence[float | None]) -> float | None:
    """The standard error of the mean of independent scores: √(Σ e²) / C for C errors e; None if one is not known."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(errors) else None


def _scale(metric: str) -> float:
    return 100.0 if metric == "exact_match" else 1.0


def root(spec: Spec) -> Spec:
    """The first vector of a sequence."""
    while isinstance(spec, Run) and spec.start is not None:
        spec = spec.start
    return spec


def drop(results: Results, row: Row, metric: str = "exact_match") -> list[float]:
    """How much the score on the first task of a sequence has fallen since it was trained, one value per seed."""
    assert row.spec is not None
    first = root(row.spec)
    before, after = (results.tested(spec, task_of(first), metric) for spec in (first, row.spec))
    return [one - other for one, other in zip(before, after, strict=True)]


def best_on_validation(results: Results, rows: Sequence[Row]) -> Row:
    """The row of several of one case with the best validation score."""

    def score(row: Row) -> float:
        assert row.spec is not None
        return results.validation(row.spec)

    return max(rows, key=score)


def differences(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> list[list[float]]:
    """Differences of two rows by case and seed: the seeds of both have the same data in the same order."""
    return [[a - b for a, b in zip(first, second, strict=True)] for first, second in zip(one, other, strict=True)]
