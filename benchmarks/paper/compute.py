"""Computes cells: trains or merges a vector, scores it, and chooses settings on validation parts."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import taskvec
from taskvec.errors import DivergedError, TrainingError

from .selection import Setting, cell_of, choose, fine_tuning
from .specs import Merge, Run, Spec, described
from .store import Cell, Record, Store, locked
from .worlds import Place

Scores = dict[str, tuple[float, float | None]]  # metric -> value and standard error


class Lab:
    """Computes the cells of a world that are not in its results.

    Args:
        place: The world and its files.
        store: Its results.
        head: Number of the description of the base and the packages in the results.
    """

    def __init__(self, place: Place, store: Store, head: int) -> None:
        self.place = place
        self.world = place.world
        self.store = store
        self.head = head

    def choose(self, spec: Spec) -> Setting:
        """The setting that is best on the validation parts."""
        return choose(spec, self.world, self.cell)

    def cell(self, spec: Spec, setting: Setting, seed: int) -> Record:
        """The record of a cell, with its scores on the validation part of its task. Computed if it is missing.

        Args:
            spec: The spec.
            setting: The learning rate of a run, or the options of a merge.
            seed: The seed.
        """
        cell = cell_of(spec, setting, seed)
        if (found := self._known(cell)) is not None:
            return found
        with self._locked(cell):
            if (found := self._known(cell)) is not None:
                return found
            record: Record = {
                "key": cell[0],
                "setting": setting,
                "seed": seed,
                "head": self.head,
                "validation": None,
            }
            if not self.store.knows(cell[0]):
                record["spec"] = described(spec)  # once per key
            try:
                record |= self._make(spec, setting, seed)
                tasks = {part.task for part in spec.parts if isinstance(part, Run)} if isinstance(spec, Merge) else None
                vector = self.path(cell)
                scores = [self.score(vector, task, "validation") for task in sorted(tasks or {task_of(spec)})]
                record["validation"] = {name: _mean([each[name] for each in scores]) for name in scores[0]}
            except (DivergedError, _NotFiniteError) as error:
                record["diverged"] = str(error)
            self.store.add(record)
            return record

    def test(self, spec: Spec | None, setting: Setting, seed: int, task: str) -> Record:
        """The scores of a cell on the test part of a task. Computed if they are missing.

        Args:
            spec: The spec; None is the base.
            setting: The setting that was chosen.
            seed: The seed.
            task: The task.
        """
        cell = cell_of(spec, setting, seed)
        self.store.refresh()
        if (found := self.store.test(cell, task)) is not None:
            return found
        if spec is not None and "diverged" in self.cell(spec, setting, seed):
            scores: Scores = {"exact_match": (0.0, None)}  # no vector, so no answer
        else:
            vector = None if spec is None else self.vector(spec, setting, seed)
            scores = self.score(vector, task, "test")
        record = {"key": cell[0], "setting": setting, "seed": seed, "split": "test", "task": task, **scores}
        self.store.add(record)
        return record

    def vector(self, spec: Spec, setting: Setting, seed: int) -> Path:
        """The file of a cell's vector, made again if it is missing."""
        cell = cell_of(spec, setting, seed)
        self.cell(spec, setting, seed)
        path = self.path(cell)
        if not path.exists():
            with self._locked(cell):
                if not path.exists():
                    self._make(spec, setting, seed)
        return path

    def chosen(self, spec: Spec, seed: int) -> Path:
        """The file of a vector with the setting that is chosen for it."""
        return self.vector(spec, self.choose(spec), seed)

    def path(self, cell: Cell) -> Path:
        """Where a cell has its vector. Other results may choose other settings for what it is made from."""
        return self.place.folder / "vectors" / self.store.path.stem / f"{_name(cell)}.lota"

    def score(self, vector: Path | None, task: str, part: str) -> Scores:
        """Scores of a vector on the part "validation" or "test" of a task: metric -> value and standard error."""
        only_loss = self.world.select == "loss" and part == "validation"
        try:
            found = taskvec.evaluate(
                self.place.base,
                self.place.test(task) if part == "test" else self.place.validation(task),
                [] if vector is None else [vector],
                metrics=("loss",) if only_loss else ("loss", "exact_match"),
                batch_size=self.world.evaluation_batch,
                max_length=self.world.max_length,
                max_new_tokens=None if only_loss else self.world.budget(task).answer,
            )
        except TrainingError as error:
            if "the loss is" not in str(error):
                raise
            raise _NotFiniteError(str(error)) from error
        return {
            name: (
                _rounded(estimate.value),
                None if estimate.standard_error is None else _rounded(estimate.standard_error),
            )
            for name, estimate in found.metrics.items()
        }

    def _make(self, spec: Spec, setting: Setting, seed: int) -> Record:
        path, began = self.path(cell_of(spec, setting, seed)), time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"computing {label(spec)}, {json.dumps(setting)}, seed {seed}", file=sys.stderr, flush=True)
        if isinstance(spec, Merge):
            assert isinstance(setting, dict)
            parts = [self.chosen(part, seed) for part in spec.parts]
            weight = setting.get("weight", 1.0)
            others = {name: value for name, value in setting.items() if name != "weight"}
            taskvec.merge(parts, spec.method, [weight] * len(parts), **others).save(path, force=True)
            return {"bytes": path.stat().st_size}
        assert isinstance(setting, float)
        result = self._train(spec, setting, seed)
        result.vector.save(path, force=True)
        losses = result.curve.losses
        record: Record = {
            "entries": result.entries,
            "bytes": path.stat().st_size,
            "seconds": round(time.perf_counter() - began, 2),
            "last_losses": _rounded(fmean(losses[-10:])),
        }
        if result.calibration_lr is not None:
            record["calibration_lr"] = result.calibration_lr
        if spec.method == "lora":
            rank = spec.option("rank", 64)
            record["adapter_bytes"] = 4 * rank * sum(sum(each.shape) for each in result.vector.specs.values())
        return record

    def _train(self, spec: Run, rate: float, seed: int) -> Any:
        options, budget = dict(spec.options), self.world.budget(spec.task)
        mask = None if spec.mask is None else self.chosen(spec.mask, seed)
        start = None if spec.start is None else self.chosen(spec.start, seed)
        disjoint = None if spec.disjoint is None else self.chosen(spec.disjoint, seed)
        if "calibration_steps" in options and "calibration_lr" not in options:
            # calibration is full fine-tuning, and has its best rate
            options["calibration_lr"] = self.choose(fine_tuning(spec.task, budget.steps))
        return taskvec.train(
            self.place.base,
            self.place.train(spec.task, seed),
            lr=rate,
            seed=seed,
            batch_size=budget.batch,
            max_length=self.world.max_length,
            mask_from=mask,
            start_from=start,
            disjoint_from=[] if disjoint is None else [disjoint],
            mix=[] if spec.mix is None else [(self.place.train(spec.mix[0], seed), spec.mix[1])],
            **options,
        )

    def _known(self, cell: Cell) -> Record | None:
        self.store.refresh()
        return self.store.cell(cell)

    def _locked(self, cell: Cell) -> Any:
        return locked(self.place.folder / "locks" / self.store.path.stem / _name(cell))


class _NotFiniteError(Exception):
    """The loss of an evaluation is not a number."""


def task_of(spec: Spec) -> str:
    """The task that a spec was last trained on."""
    return spec.task if isinstance(spec, Run) else task_of(spec.parts[-1])


def label(spec: Spec) -> str:
    """A spec in words, for progress."""
    if isinstance(spec, Merge):
        return f"{spec.method} of {' and '.join(map(label, spec.parts))}"
    words = [f"{name}={value}" for name, value in spec.options if value is not None and name != "steps"]
    before = f"{label(spec.start)} -> " if spec.start else ""
    mixed = f" + {spec.mix[1]:g} {spec.mix[0]}" if spec.mix else ""
    masked = f", mask of {label(spec.mask)}" if spec.mask else ""
    return f"{before}{spec.task}{mixed} ({', '.join(words)}{masked})"


def _name(cell: Cell) -> str:
    key, setting, seed = cell
    plain = "".join(character if character.isalnum() or character in ".-" else "_" for character in setting)
    return f"{key}-{plain}-{seed}"


def _mean(scores: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    """The mean of scores on several tasks, and its standard error."""
    errors = [error for _, error in scores if error is not None]
    error = _rounded(math.hypot(*errors) / len(scores)) if len(errors) == len(scores) else None
    return _rounded(fmean(value for value, _ in scores)), error


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
