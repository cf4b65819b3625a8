"""The settings in which everything is measured: a small model on formal tasks, and SmolLM2-135M on real ones."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from taskvec.data.sources import read_tables
from taskvec_formats.system.atomic import atomic_directory, atomic_file

from .language import TEST, VALIDATION, Item, distinct_items, held_out
from .pretrain import SMALL_MODEL
from .refusals import questions
from .specs import Run

Rates = tuple[float, ...]
Parts = dict[str, list[Item]]  # "train", "validation" or "test" -> examples
# grids of learning rates
TWO_PER_DECADE: Rates = tuple(float(f"{step}e{power}") for power in range(-6, 1) for step in (1, 3))
FOUR_PER_DECADE: Rates = tuple(float(f"{step}e{power}") for power in range(-6, 1) for step in (1, 1.8, 3, 5.6))


@dataclass(frozen=True)
class Budget:
    """The budget of every method on a task.

    Attributes:
        steps: Optimizer steps, including those of calibration.
        calibration: Optimizer steps of calibration.
        batch: Examples per step.
        answer: Maximum number of tokens of an answer; None derives it from the data.
    """

    steps: int
    calibration: int
    batch: int
    answer: int | None = None


@dataclass(frozen=True)
class World:
    """A base, tasks, and the budget of every method.

    Attributes:
        name: The name, which names the results.
        budgets: Task -> its budget; "" for all other tasks.
        max_length: Maximum number of tokens of an example.
        train: Number of training examples.
        validation: Number of validation examples, on which settings are chosen.
        test: Number of test examples, on which nothing is chosen.
        select: The metric that settings are chosen by: "exact_match" or "loss".
        tuning_seeds: Seeds with which settings are chosen.
        seeds: Seeds of the results.
        rates: Method -> the learning rates to begin with.
        grid: All learning rates that may be tried.
        evaluation_batch: Examples of an evaluation at a time.
        formal: Whether the tasks are those of `language`, and the base is the small model, which is committed.
        known: Method -> learning rate, which is not tuned again: that of full fine-tuning, of LoRA, and of masks that
            are 90 % sparse and random or LoTA's.
    """

    name: str
    budgets: dict[str, Budget] = field(hash=False)
    max_length: int
    train: int | None
    validation: int
    test: int | None
    select: str
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    rates: dict[str, Rates] = field(hash=False)
    grid: Rates
    evaluation_batch: int = 32
    formal: bool = False
    known: dict[str, float] = field(default_factory=dict, hash=False)

    def budget(self, task: str) -> Budget:
        """The budget of every method on a task."""
        return self.budgets.get(task) or self.budgets[""]

    def known_rate(self, run: Run) -> float | None:
        """The learning rate of a run that is not tuned again."""
        usual = run.option("mask", "magnitude") in ("magnitude", "random") and run.option("scope") is None
        return self.known.get(run.method) if run.option("sparsity") in (None, 0.9) and usual else None


SMALL = World(
    name="small",
    budgets={"": Budget(120, 24, 16)},
    max_length=64,
    train=640,
    validation=VALIDATION,
    test=TEST,
    select="exact_match",
    tuning_seeds=(0, 1),
    seeds=(0, 1, 2, 3, 4),
    rates={"fft": (3e-4, 1e-3, 3e-3), "lora": (1e-3, 3e-3, 1e-2), "lota": (1e-3, 3e-3, 1e-2)},
    grid=FOUR_PER_DECADE,
    evaluation_batch=256,
    formal=True,
)
SMOLLM2 = World(
    name="smollm2",
    budgets={"": Budget(50, 10, 8, 80), "sql": Budget(40, 8, 4, 80)},
    max_length=512,
    train=None,
    validation=128,
    test=300,
    select="loss",
    tuning_seeds=(0,),
    seeds=(0,),
    rates={"fft": (1e-5, 3e-5, 1e-4), "lora": (1e-4, 3e-4, 1e-3), "lota": (1e-3, 3e-3, 1e-2)},
    grid=TWO_PER_DECADE,  # only masks that are 99 % sparse are tuned here
    # the best on the validation parts of mawps and sql, of the same sweep for each method (make bench-rates)
    known={"fft": 3e-5, "lora": 3e-4, "lota": 3e-4},
)
SMOLLM2_LONG = replace(
    SMOLLM2,
    name="smollm2-long",
    budgets={"": Budget(200, 40, 8, 80)},
    seeds=(0, 1, 2),
    rates={**SMOLLM2.rates, "lota": (3e-4, 1e-3, 3e-3)},
    known={},
    evaluation_batch=64,
)
WORLDS = {world.name: world for world in (SMALL, SMOLLM2, SMOLLM2_LONG)}

PROBE = "refuse"  # a task that is generated


class TaskError(Exception):
    """A real task is not given."""


@dataclass(frozen=True)
class Place:
    """Where a world has its files.

    Attributes:
        world: The world.
        folder: Folder of the base, the data and the vectors. What is missing is made.
        tasks: Real tasks: name -> data to train on and data to test on, each a file, a folder or a Hub id. The small
            world needs none.
    """

    world: World
    folder: Path
    tasks: dict[str, tuple[Path, Path]] = field(default_factory=dict, hash=False)

    @property
    def base(self) -> Path:
        """The model folder."""
        return self.folder / "base"

    def check(self, tasks: Iterable[str]) -> None:
        """Check that the data of tasks are given.

        Raises:
            TaskError: Those of a task are not.
        """
        for task in sorted(tasks):
            if not self.world.formal and task != PROBE and task not in self.tasks:
                raise TaskError(f"the task {task} is needed: give --task {task}=TRAIN,TEST or a folder of tasks")

    def prepare(self) -> None:
        """Make the base if it is missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.base.exists():
            return
        if self.world.formal:
            with atomic_directory(self.base) as temporary:
                shutil.copytree(SMALL_MODEL, temporary, dirs_exist_ok=True)
        else:
            from taskvec.demo.smollm2 import write_base

            write_base(self.base)

    def train(self, task: str, seed: int) -> Path:
        """The file to train on. In the small world each seed has other examples."""
        return self._file(task, "train", seed)

    def validation(self, task: str) -> Path:
        """The file on which settings are chosen."""
        return self._file(task, "validation")

    def test(self, task: str) -> Path:
        """The file on which nothing is chosen."""
        return self._file(task, "test")

    def _file(self, task: str, part: str, seed: int = 0) -> Path:
        """A part of a task. It is written if it is missing."""
        name = f"{task}-{part}-{seed}" if self.world.formal and part == "train" else f"{task}-{part}"
        path = self.folder / "data" / f"{name}.jsonl"
        if not path.exists():
            parts = self._formal(task, seed) if self.world.formal else self._real(task)
            _write(path, parts[part])
        return path

    def _formal(self, task: str, seed: int) -> Parts:
        """Exercises of a formal task. No prompt is in two parts."""
        assert self.world.test is not None
        validation, test = held_out(task, self.world.validation, self.world.test)
        seen = {row["prompt"] for row in validation + test}
        train = distinct_items(task, random.Random(f"{task} {seed}"), seen)
        return {"train": [*islice(train, self.world.train)], "validation": validation, "test": test}

    def _real(self, task: str) -> Parts:
        """A real task, or the probe. The validation part is split off with a fixed seed; no prompt is in two parts."""
        if task == PROBE:
            rows = [*questions(random.Random(0))]
            cut = len(rows) // 4
            return {"train": rows[2 * cut :], "validation": rows[cut : 2 * cut], "test": rows[:cut]}
        self.check([task])
        rows, test = (_rows(source) for source in self.tasks[task])
        test = test[: self.world.test]
        tested = {row["prompt"] for row in test}
        rows = [row for row in rows if row["prompt"] not in tested]
        random.Random(0).shuffle(rows)
        validation = rows[: self.world.validation]
        held = {row["prompt"] for row in validation}
        train = [row for row in rows[self.world.validation :] if row["prompt"] not in held]
        return {"train": train[: self.world.train], "validation": validation, "test": test}


def _rows(source: Path) -> list[Item]:
    return [row for table in read_tables(source) for _, row in table.rows]


def _write(path: Path, rows: Iterable[Item]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
