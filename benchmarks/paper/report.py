"""Prints the tables of a world, and the verdicts on the claims of the paper, as Markdown. Reads results only.

Usage: python -m paper.report WORLD RESULTS [--quick] [TABLE ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from . import tables
from .scores import MissingError, Results, best_on_validation, differences, drop, error_of_mean, mean_of
from .store import Store
from .tables import Row, Table
from .worlds import WORLDS, World

CLAIMS = Path(__file__).parent / "claims.yaml"
UNITS = {"exact_match": "exact match, %", "loss": "loss, nats per token"}
Scores = tuple[list[float], float | None]  # one value per seed, and the standard error of the first over test examples
Pivot = dict[str, dict[str, list[Scores]]]  # row, column -> one per case


def rendered(table: Table, results: Results) -> str:
    """All views of a table that have something to show."""
    return "\n\n".join(filter(None, (_view(table, results, view) for view in table.views)))


def _view(table: Table, results: Results, view: Mapping[str, Any]) -> str:
    kinds: dict[str, Callable[[Table, Results, Mapping[str, Any]], str]] = {
        "tasks": _by_task,
        "positions": _by_position,
        "cases": _by_case,
        "variable": _by_variable,
        "rates": _rates,
        "storage": _storage,
    }
    return kinds[view["kind"]](table, results, view)


def _by_task(table: Table, results: Results, view: Mapping[str, Any]) -> str:
    """One column per case, and the mean of several."""
    metric, several = view["metric"], len({row.report for row in table.rows}) > 1
    pivot: Pivot = {}
    for row in table.rows:
        (task,) = row.report
        _put(pivot, row.name, task, partial(scored, results, row, metric))
        if several:
            _put(pivot, row.name, "mean", partial(scored, results, row, metric))
    return _markdown(pivot, UNITS[metric], digits=1 if metric == "exact_match" else 3)


def _by_position(table: Table, results: Results, view: Mapping[str, Any]) -> str:
    """One column per reported task, their mean, and how much the first one has fallen; means over the cases."""
    metric, labels = view["metric"], view["columns"]
    pivot: Pivot = {}
    for row in table.rows:
        for label, task in zip(labels, row.report, strict=False):
            _put(pivot, row.label, label, partial(scored, results, replace(row, report=(task,)), metric))
        if view.get("mean"):
            _put(pivot, row.label, "mean", partial(scored, results, row, metric))
        if view.get("drop") and row.spec is not None and getattr(row.spec, "start", None) is not None:
            _put(pivot, row.label, f"drop of {labels[0]}", partial(_dropped, results, row, metric))
    return _markdown(pivot, UNITS[metric], digits=1 if metric == "exact_match" else 3)


def _by_case(table: Table, results: Results, view: Mapping[str, Any]) -> str:
    """The first reported task, with one column per case, which is named by its first two tasks. Empty for one case."""
    metric = view["metric"]
    if len({row.report for row in table.rows}) == 1:
        return ""
    pivot: Pivot = {}
    for row in table.rows:
        first, second = row.report[:2]
        scores = partial(scored, results, replace(row, report=(first,)), metric)
        _put(pivot, row.label, f"{first}, then {second}", scores)
    return _markdown(pivot, f"{view['column']}: {UNITS[metric]}", digits=1 if metric == "exact_match" else 3)


def _by_variable(table: Table, results: Results, view: Mapping[str, Any]) -> str:
    """One column per value of a variable; means over the cases."""
    metric, by = view["metric"], view["by"]
    pivot: Pivot = {}
    for row in table.rows:
        if by in row.variables:
            label = f"{100 * row.variables[by]:g} %"
            _put(pivot, row.name, label, partial(scored, results, row, metric))
    return _markdown(pivot, UNITS[metric], digits=1 if metric == "exact_match" else 3)


def _rates(table: Table, results: Results, view: Mapping[str, Any]) -> str:
    """The learning rates that were chosen, one per case, in the order of their tasks."""
    by = view.get("by")
    tasks = ", ".join(dict.fromkeys(task for row in table.rows for task in row.report))
    pivot: dict[str, dict[str, list[str]]] = {}
    for row in table.rows:
        if row.spec is None or (by is not None and by not in row.variables):
            continue
        label = tasks if by is None else f"{100 * row.variables[by]:g} %"
        cell = pivot.setdefault(row.name, {}).setdefault(label, [])
        try:
            cell.append(f"{results.choice(row.spec):g}")
        except MissingError:
            cell.append("?")
    columns = list(dict.fromkeys(column for cells in pivot.values() for column in cells))
    pivot = {name: cells for name, cells in pivot.items() if any(set(rates) != {"?"} for rates in cells.values())}
    title = "learning rates" if by is None else f"learning rates for {tasks}"
    lines = [_line([title, *columns]), _rule(len(columns) + 1)]
    lines += [_line([name, *(", ".join(cells.get(column, [])) for column in columns)]) for name, cells in pivot.items()]
    return "\n".join(lines)


def _storage(table: Table, results: Results, view: Mapping[str, Any]) -> str:
    """Size on disk and quality; means over the cases."""
    lines = [_line(["vector", "bytes", "of the dense model", "exact match, %"]), _rule(4)]
    for name, rows in _groups(table.rows).items():
        try:
            sizes = [size_of(results, row) for row in rows]
            quality = mean_of([average(results, row, "exact_match") for row in rows])
        except MissingError:
            continue
        size, whole = sum(sizes) / len(sizes), results.store.heads[-1]["base_bytes"]
        lines.append(_line([name, f"{size:,.0f}", f"1/{whole / size:.0f}", str(quality)]))
    return "\n".join(lines)


def size_of(results: Results, row: Row) -> float:
    """Bytes on disk of what a row ships: an adapter for LoRA, in f32 as peft writes it, else a `.lota` file."""
    assert row.spec is not None
    is_adapter = getattr(row.spec, "method", "") == "lora"
    return results.trained(row.spec, "adapter_bytes" if is_adapter else "bytes")


def average(results: Results, row: Row, metric: str) -> list[float]:
    """The mean over the reported tasks of a row, one value per seed."""
    tested = [results.tested(row.spec, task, metric) for task in row.report]
    return [sum(seed) / len(seed) for seed in zip(*tested, strict=True)]


def scored(results: Results, row: Row, metric: str) -> Scores:
    """The mean over the reported tasks of a row, and its standard error over test examples."""
    values = average(results, row, metric)
    errors = [results.sampled(row.spec, task, metric) for task in row.report]
    return values, error_of_mean(errors)


def _dropped(results: Results, row: Row, metric: str) -> Scores:
    return drop(results, row, metric), None


def _groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of all cases by their names, with the values of variables that are not in the name."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.label, []).append(row)
    return found


def _put(pivot: Pivot, name: str, column: str, scores: Callable[[], Scores]) -> None:
    cell = pivot.setdefault(name, {}).setdefault(column, [])
    try:
        cell.append(scores())
    except MissingError:
        cell.append(([], None))


def _markdown(pivot: Pivot, title: str, digits: int) -> str:
    columns = list(dict.fromkeys(column for cells in pivot.values() for column in cells))
    columns.sort(key=lambda column: (column.startswith("drop"), column == "mean"))  # these are last
    lines = [_line([title, *columns]), _rule(len(columns) + 1)]
    for name, cells in pivot.items():
        shown = [_cell(cells.get(column), digits) for column in columns]
        lines += [_line([name, *shown])] if any(shown) else []  # a row that has not been computed is left out
    return "\n".join(lines)


def _cell(scores: list[Scores] | None, digits: int) -> str:
    if not scores or not all(values for values, _ in scores):
        return ""
    mean = mean_of(*zip(*scores, strict=True))
    return f"{mean.value:.{digits}f}" + ("" if mean.error is None else f" ± {mean.error:.{digits}f}")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return "|---" * columns + "|"


def verdicts(world: World, results: Results, *, quick: bool = False) -> str:
    """The claims of the paper, the rows that test each, and the verdict. Claims without rows are left out."""
    lines = [_line(["claim", "rows", "difference", "verdict"]), _rule(4)]
    for claim in yaml.safe_load(CLAIMS.read_text(encoding="utf-8")):
        table = tables.read(claim["table"], world, quick=quick)
        sides = [_known(names, table) for names in claim["rows"]]
        if not all(sides):
            continue
        try:
            difference, words = compared(claim, table, results)
        except MissingError:
            difference, words = "", "not computed"
        shown = " − ".join(map(_named, sides))
        lines.append(_line([f"{claim['claim']} ({claim['source']})", f"{claim['table']}: {shown}", difference, words]))
    return "\n".join(lines)


def _known(names: str | list[str], table: Table) -> list[str]:
    """Those rows of a side of a claim that a table has in its world."""
    labels = {row.label for row in table.rows}
    return [name for name in ([names] if isinstance(names, str) else names) if name in labels]


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"best of ({'; '.join(names)})"


def compared(claim: Mapping[str, Any], table: Table, results: Results) -> tuple[str, str]:
    """Test a claim.

    Args:
        claim: An entry of claims.yaml.
        table: Its table.
        results: The results of the world of the table.

    Returns:
        The difference of its rows with the standard error, and the verdict.

    Raises:
        MissingError: A row has not been computed.
    """
    part = claim.get("of", "all")
    counted = {"first": slice(0, 1), "last": slice(-1, None), "earlier": slice(0, -1), "all": slice(None)}[part]

    def values(row: Row) -> list[float]:
        return average(results, replace(row, report=row.report[counted]), "exact_match")

    def is_left(row: Row, *scores: list[float]) -> bool:
        base = fmean(fmean(results.tested(None, task, "exact_match")) for task in row.report[counted])
        return max(map(fmean, scores)) > base

    def side(names: str | list[str]) -> dict[str, Row]:
        wanted = _known(names, table)
        cases: dict[str, list[Row]] = {}
        for row in table.rows:
            if row.label in wanted:
                cases.setdefault(repr(row.case), []).append(row)
        if not cases or any(len(rows) != len(wanted) for rows in cases.values()):
            raise MissingError(f"rows {names}")
        return {case: rows[0] if len(rows) == 1 else best_on_validation(results, rows) for case, rows in cases.items()}

    first, second = side(claim["rows"][0]), side(claim["rows"][1])
    pairs = [(values(first[case]), values(second[case])) for case in first]
    if part in ("first", "earlier"):  # what both have forgotten tells nothing about which forgets more
        pairs = [pair for row, pair in zip(first.values(), pairs, strict=True) if is_left(row, *pair)]
    if not pairs:
        return "", "forgotten by both"
    mean = mean_of(differences([one for one, _ in pairs], [other for _, other in pairs]))
    if mean.error is None or len(results.world.seeds) < 3:
        return str(mean), "too few seeds"
    found, error = (-1 if claim["expects"] == "less" else 1) * mean.value, mean.error
    if found < -2 * error:
        words = "disagrees"
    elif claim["expects"] == "no less":
        words = "not rejected"
    else:
        words = "agrees" if found > 2 * error else "no difference found"
    if len(pairs) < len(first):
        words += f"; {len(first) - len(pairs)} of {len(first)} cases forgotten by both"
    return f"{mean.value:+.1f} ± {mean.error:.1f}", words


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("results", type=Path)
    parser.add_argument("tables", nargs="*")
    parser.add_argument("--quick", action="store_true", help="the tables of the quick run")
    given = parser.parse_intermixed_args()
    world = tables.sized(WORLDS[given.world], quick=given.quick)
    results = Results(world, Store(given.results))
    for name in given.tables or tables.names():
        table = tables.read(name, world, quick=given.quick)
        if table.rows:
            print(f"## {table.title}\n\n{rendered(table, results)}\n")
    if not given.tables:
        print(f"## Claims\n\n{verdicts(world, results, quick=given.quick)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
