"""Draws the results of the small world. Reads results only.

Usage: python -m paper.plots RESULTS FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from taskvec.training.criteria import CRITERIA
from taskvec.training.rates import default_rate

from . import tables
from .report import average, size_of
from .scores import MissingError, Results, mean_of
from .store import Store
from .tables import Row
from .worlds import SMALL

mpl.use("agg")
from matplotlib import pyplot as plt

PERCENT = (10, 5, 1, 0.5)
PER_TENSOR = ", per tensor"


def _lines(axes: Any, rows: Sequence[Row], results: Results, colours: dict[str, str]) -> None:
    """One line per row name: exact match over density, with standard errors."""
    for name in dict.fromkeys(row.name for row in rows):
        points = []
        for sparsity in sorted({row.variables["sparsity"] for row in rows if row.name == name}):
            cases = [row for row in rows if row.name == name and row.variables["sparsity"] == sparsity]
            try:
                points.append((1 - sparsity, mean_of([average(results, row, "exact_match") for row in cases])))
            except MissingError:
                continue
        mask = name.removesuffix(PER_TENSOR)
        axes.errorbar(
            [100 * density for density, _ in points],
            [mean.value for _, mean in points],
            [mean.error or 0 for _, mean in points],
            marker="o",
            markersize=3,
            capsize=2,
            linestyle="--" if mask == "random" else "-",
            color=colours[mask],
            label=mask,
        )
    axes.set_xscale("log")
    axes.set_xticks(PERCENT, [f"{each:g}" for each in PERCENT])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.set_xlabel("weights in the mask, %")


def masks(results: Results, path: Path) -> None:
    """Masks at equal sparsity, ranked over all tensors and tensor by tensor."""
    rows = [row for row in tables.read("masks", SMALL).rows if row.name.removesuffix(PER_TENSOR) in CRITERIA]
    names = dict.fromkeys(row.name.removesuffix(PER_TENSOR) for row in rows)
    colours = dict(zip(names, ("black", *plt.rcParams["axes.prop_cycle"].by_key()["color"]), strict=False))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    _lines(left, [row for row in rows if not row.name.endswith(PER_TENSOR)], results, colours)
    left.set(title="over all tensors together", ylabel="exact match, %")
    _lines(right, [row for row in rows if row.name.endswith(PER_TENSOR) or row.name == "random"], results, colours)
    right.set_title("in each tensor separately")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
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
        if " via " in label:
            name = "LoTA, masks of denser tickets"
        families.setdefault(name, []).append((size, mean.value, mean.error or 0))
    for name, points in families.items():
        sizes, values, errors = zip(*sorted(points), strict=True)
        marker, size = ("o", 3) if len(points) > 1 else ("*", 9)
        axes.errorbar(sizes, values, errors, marker=marker, markersize=size, capsize=2, label=name, zorder=2 + size)
    axes.grid(alpha=0.3)
    axes.set_xscale("log")
    axes.set_xlabel("bytes on disk")
    axes.set_ylabel("exact match, %")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def rates(results: Results, path: Path) -> None:
    """The learning rates chosen for masks, as multiples of that of full fine-tuning on the same task, over density."""
    rows = [*tables.read("sparsity", SMALL).rows, *tables.read("masks", SMALL).rows]
    dense = {row.report[0]: _rate(results, row) for row in rows if row.name == "full fine-tuning"}
    names = {"LoTA": "magnitude", "random mask": "random"}  # the table of sparsities has more densities of these
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        mask = names.get(row.name, row.name)
        if mask in CRITERIA:
            point = (1 - row.variables["sparsity"], _rate(results, row) / dense[row.report[0]])
            found.setdefault(mask, []).append(point)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True, layout="constrained")
    for axes, sums, title in zip(panels, (False, True), ("masks without gradients", "masks by gradients"), strict=True):
        shown = [mask for mask in found if CRITERIA[mask].sums == sums]
        for number, mask in enumerate(shown):
            shift = 1.05 ** (number - (len(shown) - 1) / 2)
            densities, ratios = zip(*dict.fromkeys(found[mask]), strict=True)  # both tables have some
            axes.plot([100 * shift * each for each in densities], ratios, "o", markersize=5, alpha=0.6, label=mask)
        line = [100, 0.5, 0.1]
        power = CRITERIA[shown[0]].rate_power
        default = [default_rate("lota", "rmsprop", each / 100, power) / default_rate("fft", "rmsprop") for each in line]
        axes.plot(line, default, color="black", linewidth=1, label="default")
        axes.set(xscale="log", yscale="log", xlabel="weights in the mask, %", title=title)
        axes.set_xticks((*PERCENT, 50, 25, 0.1), [f"{each:g}" for each in (*PERCENT, 50, 25, 0.1)])
        axes.minorticks_off()
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0].set_ylabel("best learning rate / that of full fine-tuning")
    figure.savefig(path, dpi=120)


def _rate(results: Results, row: Row) -> float:
    """The learning rate that was chosen for a row."""
    rate = results.choice(row.spec)
    assert isinstance(rate, float)
    return rate


def forgetting(results: Results, path: Path) -> None:
    """The first task against the second after both: a line per method, over learning rates of the second."""
    lines: dict[str, dict[float, list[Row]]] = {}
    for row in tables.read("tradeoff", SMALL).rows:
        lines.setdefault(row.name.partition(", rate")[0], {}).setdefault(row.variables["times"], []).append(row)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, points in lines.items():
        try:
            first, second = (
                [
                    mean_of([results.tested(row.spec, row.report[at], "exact_match") for row in rows])
                    for rows in points.values()
                ]
                for at in (0, 1)
            )
        except MissingError:
            continue
        axes.errorbar(
            [mean.value for mean in first],
            [mean.value for mean in second],
            [mean.error or 0 for mean in second],
            [mean.error or 0 for mean in first],
            marker="o",
            markersize=4,
            label=name,
        )
    axes.grid(alpha=0.3)
    axes.set_xlabel("exact match on the first task, %")
    axes.set_ylabel("exact match on the second task, %")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_all(results: Path, folder: Path) -> None:
    """Draw all plots."""
    found = Results(SMALL, Store(results))
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (masks, rates, storage, forgetting):
        draw(found, folder / f"{draw.__name__}.png")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw_all(Path(sys.argv[1]), Path(sys.argv[2]))
