"""Reads the experiments from tables/*.yaml, one file per table, and expands them to specs.

A table has `cases`, sets of variables per world, and `rows`. `$name` in a row stands for a variable. A row with `for`
stands for one row per combination of the values of its variables. A row describes a vector: `train` or `merge`, or
nothing for the base. `report` lists the tasks whose test parts are scored. `worlds` lists the worlds of a row, and as a
mapping it replaces values of `for` in each. `budget: 2` is twice the steps, and `rate: single` takes the learning rate
that is best for one budget.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from taskvec.training.criteria import CRITERIA
from taskvec.training.options import TrainingOptions

from .specs import Merge, Options, Run, Spec
from .worlds import World

TABLES = Path(__file__).parent / "tables"
QUICK_SEEDS = (0, 1, 2)
DEFAULT_MASK = TrainingOptions().mask


class TableError(Exception):
    """A table file cannot be understood."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        table: The name of the table.
        case: The variables of the case.
        name: The name of the row.
        variables: The variables of `for`.
        spec: What is computed; None is the base.
        report: Tasks whose test parts are scored.
    """

    table: str
    case: Mapping[str, Any]
    name: str
    variables: Mapping[str, Any]
    spec: Spec | None
    report: tuple[str, ...]

    @property
    def label(self) -> str:
        """The name with the values of the variables that are not in it."""
        extra = [f"{100 * value:g} %" for name, value in self.variables.items() if name in ("sparsity", "share")]
        return ", ".join([self.name, *extra])


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: The name of its file.
        title: Its title.
        rows: Its rows, case by case.
        views: How the report shows it.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    views: tuple[Mapping[str, Any], ...]


def sized(world: World, *, quick: bool) -> World:
    """A world with fewer seeds for a quick run."""
    return replace(world, tuning_seeds=QUICK_SEEDS[:1], seeds=QUICK_SEEDS) if quick else world


def names() -> list[str]:
    """The names of all tables, in the order in which they are computed."""
    order = yaml.safe_load((TABLES / "order.yml").read_text(encoding="utf-8"))
    return [str(name) for name in order]


def read(name: str, world: World, *, quick: bool = False) -> Table:
    """Read a table.

    Args:
        name: The name of its file.
        world: The world to compute it in. Rows and cases of other worlds are left out.
        quick: Whether to keep only the first case and the rows marked `quick`. If the mark is a mapping, it replaces
            values of `for`.

    Raises:
        TableError: The file cannot be understood.
    """
    document = yaml.safe_load((TABLES / f"{name}.yaml").read_text(encoding="utf-8"))
    cases = document["cases"].get(world.name, [])
    rows = [
        row
        for case in (cases[:1] if quick else cases)
        for template in document["rows"]
        if world.name in template.get("worlds", [world.name]) and (template.get("quick") or not quick)
        for row in _rows(name, template, case, document["report"], world, quick=quick)
    ]
    return Table(name, document["title"], tuple(rows), tuple(document["show"]))


def _rows(
    table: str, template: Mapping[str, Any], case: Mapping[str, Any], report: list[str], world: World, *, quick: bool
) -> Iterator[Row]:
    ranges = template.get("for", {})
    worlds = template.get("worlds")
    if isinstance(worlds, dict):
        ranges = {**ranges, **(worlds[world.name] or {})}
    if quick and isinstance(template["quick"], dict):
        ranges = {**ranges, **template["quick"]}
    for values in itertools.product(*ranges.values()):
        variables = dict(zip(ranges, values, strict=True))
        known = {**case, **variables}
        filled = {key: _filled(template[key], known) for key in ("name", "train", "merge") if key in template}
        if "train" in filled:
            spec: Spec | None = _run(filled["train"], world)
        elif "merge" in filled:
            spec = _merge(filled["merge"], world)
        else:
            spec = None
        reported = _filled(template.get("report", report), known)
        yield Row(table, case, filled["name"], variables, spec, tuple(reported))


def _filled(value: Any, known: Mapping[str, Any]) -> Any:
    """Replace variables in a value."""
    if isinstance(value, str):
        if value.startswith("$") and value[1:] in known:
            return known[value[1:]]
        for name in sorted(known, key=len, reverse=True):
            value = value.replace(f"${name}", str(known[name]))
        if "$" in value:
            raise TableError(f"{value!r} contains an unknown variable")
        return value
    if isinstance(value, list):
        return [_filled(each, known) for each in value]
    if isinstance(value, dict):
        return {key: _filled(each, known) for key, each in value.items()}
    return value


def _run(given: Mapping[str, Any], world: World) -> Run:
    options = dict(given)
    task = options.pop("task")
    start, mask, disjoint = (
        _run(options.pop(key), world) if key in options else None for key in ("start", "mask_from", "disjoint_from")
    )
    if options.pop("disjoint", False):
        disjoint = start
    mix, rate, times = options.pop("mix", None), options.pop("rate", None), options.pop("rate_times", 1.0)
    budget, multiple = world.budget(task), options.pop("budget", 1)
    method = options.get("method", "lota")
    if options.get("mask") == DEFAULT_MASK:  # rows that name the default share results with those that do not
        del options["mask"]
    if method != "lota":
        options["sparsity"] = None
    calibrates = method == "lota" and mask is None and CRITERIA[options.get("mask", DEFAULT_MASK)].calibrates
    if calibrates:
        options.setdefault("calibration_steps", budget.calibration)
    steps = options.get("steps", "all")
    if steps == "all":  # those of calibration are part of the budget
        options["steps"] = multiple * budget.steps - (options["calibration_steps"] if calibrates else 0)
    elif steps == "rest":
        options["steps"] = budget.steps - budget.calibration
    if rate == "single":  # that of the same training within one budget
        rate = _run({name: given[name] for name in given if name not in ("budget", "rate")}, world)
    fixed = tuple(sorted(options.items()))
    alone = start is None and mix is None and disjoint is None and times == 1.0
    if rate is None and not alone:
        rate = Run(task, fixed, mask=mask)
    return Run(task, fixed, start, mask, disjoint, None if mix is None else (mix["task"], mix["share"]), rate, times)


def _merge(given: Mapping[str, Any], world: World) -> Merge:
    search = given.get("search", {})
    settings: list[Options] = [
        tuple(sorted(zip(search, values, strict=True))) for values in itertools.product(*search.values())
    ]
    return Merge(tuple(_run(part, world) for part in given["parts"]), given["method"], tuple(settings))
