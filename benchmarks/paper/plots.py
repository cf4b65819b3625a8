"""Draws the results of the small world. Reads results only.

Usage: python -m paper.plots RESULTS FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from . import tables
from .report import average, size_of
from .results import MissingError, Results, drop, mean_of
from .store import Store
from .tables import Row
from .worlds import SMALL

mpl.use("agg")
from matplotlib import pyplot as plt


def _lines(axes: Any, rows: Sequence[Row], results: Results) -> None:
    """One line per row name: exact match over density, with standard errors."""
    names = list(dict.fromkeys(row.name for row in rows))
    for name in names:
        points = []
        for sparsity in sorted({row.variables["sparsity"] for row in rows if row.name == name}):
            cases = [row for row in rows if row.name == name and row.variables["sparsity"] == sparsity]
            try:
                points.append((1 - sparsity, mean_of([average(results, row, "exact_match") for row in cases])))
            except MissingError:
                continue
        axes.errorbar(
            [100 * density for density, _ in points],
            [mean.value for _, mean in points],
            [mean.error or 0 for _, mean in points],
            marker="o",
            markersize=3,
            capsize=2,
            linestyle="--" if name == "random" else "-",
            color="black" if name == "random" else None,
            label=name,
        )
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("weights in the mask, %")
    axes.set_ylabel("exact match, %")
    axes.legend(fontsize=7)


def masks(results: Results, path: Path) -> None:
    """Masks at equal sparsity, ranked over all tensors and tensor by tensor."""
    rows = tables.read("masks", SMALL).rows
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    each = ", per tensor"
    _lines(left, [row for row in rows if not row.name.endswith(each)], results)
    left.set_title("over all tensors together")
    _lines(right, [row for row in rows if row.name.endswith(each) or row.name == "random"], results)
    right.set_title("in each tensor separately")
    figure.savefig(path, dpi=120)


def storage(results: Results, path: Path) -> None:
    """Exact match over bytes on disk."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    families: dict[str, list[tuple[float, float, float]]] = {}
    labels: dict[str, list[Row]] = {}
    for row in tables.read("storage", SMALL).rows:
        labels.setdefault(row.label, []).append(row)
    for label, rows in labels.items():
        try:
            size = sum(size_of(results, row) for row in rows) / len(rows)
            mean = mean_of([average(results, row, "exact_match") for row in rows])
        except MissingError:
            continue
        name = label.partition(",")[0]
        if "then" in label:
            name = "LoTA, from denser tickets"
        families.setdefault(name, []).append((size, mean.value, mean.error or 0))
    for name, points in families.items():
        sizes, values, errors = zip(*sorted(points), strict=True)
        axes.errorbar(sizes, values, errors, marker="o", markersize=3, capsize=2, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("bytes on disk")
    axes.set_ylabel("exact match, %")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def forgetting(results: Results, path: Path) -> None:
    """What a second task gains, and what the first one loses by it."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for table in ("sequential", "mixed"):
        labels: dict[str, list[Row]] = {}
        for row in tables.read(table, SMALL).rows:
            if row.spec is not None and getattr(row.spec, "start", None) is not None:
                labels.setdefault(row.label, []).append(row)
        for label, rows in labels.items():
            try:
                lost = mean_of([drop(results, row) for row in rows])
                gained = mean_of([results.tested(row.spec, row.report[1], "exact_match") for row in rows])
            except MissingError:
                continue
            marker = "s" if table == "mixed" else "o"
            axes.errorbar(lost.value, gained.value, gained.error or 0, lost.error or 0, marker=marker, markersize=4)
            axes.annotate(label, (lost.value, gained.value), fontsize=6, xytext=(4, 3), textcoords="offset points")
    axes.set_xlabel("fall of exact match on the first task, points")
    axes.set_ylabel("exact match on the second task, %")
    figure.savefig(path, dpi=120)


def draw_all(results: Path, folder: Path) -> None:
    """Draw all plots."""
    found = Results(SMALL, Store(results))
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (masks, storage, forgetting):
        draw(found, folder / f"{draw.__name__}.png")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw_all(Path(sys.argv[1]), Path(sys.argv[2]))
