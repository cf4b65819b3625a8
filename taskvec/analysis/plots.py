"""Plots with matplotlib (extra `plot`): masks as heat maps of blocks × modules, and the losses of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from taskvec_formats.system.atomic import atomic_file
from taskvec_formats.text import printable

from ..destination import appearing, check_file
from ..errors import UsageError
from ..names import layer_and_module
from ..packages import require
from ..vectors.vector import TaskVector
from .overlap import Module, Overlap

_FORMATS = (".png", ".svg", ".pdf")
# names from files must not be interpreted as TeX formulas
_LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}
_DPI, _PIXELS = 150, 1 << 16  # the most pixels per side that matplotlib supports
_LABEL, _TITLE = 0.07, 0.085  # the mean width of a character, in inches


def plot_overlap(labels: Sequence[str], pairs: Sequence[Overlap], path: Path, *, force: bool = False) -> None:
    """Draw one heat map per pair of vectors: the Jaccard index of the two masks in each module of each block.

    All panels share one colour scale. A mark on it shows the value for independent random masks, if it is the same for
    all pairs.

    Args:
        labels: One label per vector.
        pairs: The overlaps to draw.
        path: The picture to write.
        force: Whether to replace an existing file of that name.

    Raises:
        UsageError, OutputExistsError: As in `check_picture`.
    """
    check_picture(path, force=force)
    names = [printable(label, 40) for label in labels]
    panels = [
        (
            f"{names[pair.a]} and {names[pair.b]}\n{pair.total.intersection:,} shared positions, "
            f"Jaccard {pair.total.jaccard:.1%}, by chance {pair.expected_jaccard:.1%}",
            {place: cell.jaccard for place, cell in pair.modules.items()},
        )
        for pair in pairs
    ]
    chance = [pair.expected_jaccard for pair in pairs]
    figure = _draw(panels, "Jaccard index", chance[0] if len(set(chance)) == 1 else None, "chance")
    _save(figure, path, force=force)


def plot_density(label: str, vector: TaskVector, path: Path, *, force: bool = False) -> None:
    """Draw the density of a vector in each module of each block.

    Args:
        label: The label of the vector.
        vector: The vector.
        path: The picture to write.
        force: Whether to replace an existing file of that name.

    Raises:
        UsageError, OutputExistsError: As in `check_picture`.
    """
    check_picture(path, force=force, inputs=vector.inputs)
    entries: dict[Module, tuple[int, int]] = {}
    for name, spec in vector.specs.items():
        place = layer_and_module(name)
        count, size = entries.get(place, (0, 0))
        entries[place] = (count + (spec.entries or len(vector[name])), size + spec.size)
    total = sum(count for count, _ in entries.values())
    share = total / vector.eligible if vector.eligible else 0.0
    density = {place: count / size if size else 0.0 for place, (count, size) in entries.items()}
    title = f"{printable(label, 40)}: {total:,} entries, density {share:.2%}"
    _save(_draw([(title, density)], "density", share, "mean"), path, force=force)


def plot_losses(
    label: str,
    calibration: Sequence[float],
    losses: Sequence[float],
    evaluations: Sequence[tuple[int, float]],
    path: Path,
    *,
    metrics: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    force: bool = False,
) -> None:
    """Draw the loss of every step in nats per token: calibration before step 0, training, and evaluations as dots.

    Args:
        label: The title of the plot.
        calibration: The losses of the calibration steps.
        losses: The losses of the training steps.
        evaluations: (step, loss) of the evaluations.
        path: The picture to write.
        metrics: Name -> (step, value in [0, 1]) of the same evaluations, drawn in a panel below.
        force: Whether to replace an existing file of that name.

    Raises:
        UsageError, OutputExistsError: As in `check_picture`.
    """
    check_picture(path, force=force)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    metrics = {name: points for name, points in (metrics or {}).items() if points}
    figure = Figure(figsize=(7, 6 if metrics else 4), layout="constrained")
    panels = figure.subplots(
        2 if metrics else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + bool(metrics)]
    )
    axes, last = panels[0, 0], panels[-1, 0]
    if calibration:
        axes.plot(range(-len(calibration), 0), calibration, color="0.6", label="calibration")
        axes.axvline(0, color="0.8", linewidth=1)
    axes.plot(range(1, len(losses) + 1), losses, label="training")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o-", label="held out")
    axes.set(ylabel="loss (nats per token)")
    last.set(xlabel="step")
    last.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_title(printable(label, 60), **_LITERAL)
    axes.legend()
    for number, (name, points) in enumerate(metrics.items()):
        last.plot(
            *zip(*points, strict=True), "os"[number % 2] + "-", color=f"C{number + 2}", label=name.replace("_", " ")
        )
    if metrics:
        last.set(ylabel="held out", ylim=(-0.03, 1.03))
        last.legend()
    for panel in panels[:, 0]:
        panel.spines[["top", "right"]].set_visible(False)
    _save(figure, path, force=force)


def plot_trials(
    metric: str,
    objectives: Sequence[str],
    trials: Sequence[tuple[int, Sequence[float] | None, str]],
    path: Path,
    *,
    force: bool = False,
) -> None:
    """Draw the objectives of a search by trial; two objectives are drawn against each other.

    Args:
        metric: The name of the metric. The loss is minimized, others are maximized.
        objectives: The names of the objectives.
        trials: (number, values, state) of each trial. The values of trials that were pruned are None.
        path: The picture to write.
        force: Whether to replace an existing file of that name.

    Raises:
        UsageError, OutputExistsError: As in `check_picture`.
    """
    check_picture(path, force=force)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    done = [(number, values) for number, values, _ in trials if values is not None]
    if len(objectives) == 2:
        points = [tuple(values) for _, values in done]
        axes.plot(*zip(*points, strict=True), "o") if points else None
        axes.set(
            xlabel=f"{metric} of {printable(objectives[0], 40)}", ylabel=f"{metric} of {printable(objectives[1], 40)}"
        )
    else:
        best = min if metric == "loss" else max
        for number, name in enumerate(objectives):
            series = [(trial, values[number]) for trial, values in done]
            if not series:
                continue
            axes.plot(*zip(*series, strict=True), "o", color=f"C{number}", markersize=4, label=printable(name, 40))
            reached = [best(value for _, value in series[: count + 1]) for count in range(len(series))]
            label = f"best until then, {printable(name, 40)}" if len(objectives) > 1 else "best until then"
            axes.plot([trial for trial, _ in series], reached, color=f"C{number}", linewidth=1, label=label)
        pruned = [number for number, values, _ in trials if values is None]
        for number, trial in enumerate(pruned):
            axes.axvline(trial, ymax=0.03, color="0.5", linewidth=2, label=None if number else "pruned")
        axes.set(xlabel="trial", ylabel=metric.replace("_", " "))
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        if done:
            axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path, force=force)


def check_picture(path: Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Check that a picture can be written, before any work.

    Args:
        path: The picture.
        force: Whether an existing file may be replaced.
        inputs: The files and folders that are read.

    Raises:
        UsageError: The file type is not supported, matplotlib is not installed, or as in `check_file`.
        OutputExistsError: The file exists and `force` is False.
    """
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"{path}: the file type of a picture must be one of {', '.join(_FORMATS)}")
    require("a picture", "plot")
    check_file(path, force=force, inputs=inputs)


def _draw(panels: Sequence[tuple[str, Mapping[Module, float]]], unit: str, mark: float | None, label: str) -> Any:
    from matplotlib.figure import Figure  # the object API: no display, no global state
    from matplotlib.ticker import PercentFormatter

    places = [place for _, values in panels for place in values]
    layers = sorted({layer for layer, _ in places if layer is not None})
    # modules in the blocks come first, then those outside, which may have the same names
    rows = sorted({(layer is None, module) for layer, module in places})
    shown = [printable(module, 40) for _, module in rows]
    columns = max(len(layers), 1)
    longest = max(map(len, shown), default=0)
    width = max(6.0, 2.6 + 0.3 * columns) + 0.15 * max(0, longest - 24)
    room = int((width - _LABEL * longest) / _TITLE)
    titles = [_wrapped(title, room) for title, _ in panels]
    lines = max((title.count("\n") for title in titles), default=0)
    height = (0.34 * max(len(rows), 2) + 1.1 + 0.17 * lines) * len(panels)
    if max(width, height) * _DPI >= _PIXELS:
        raise UsageError(
            f"a picture of {len(rows):,} modules in {columns:,} blocks, {len(panels):,} times, would be too large: "
            f"at most {_PIXELS:,} pixels per side are supported"
        )
    figure = Figure(figsize=(width, height), layout="constrained")
    top = max((value for _, values in panels for value in values.values()), default=0.0) or 1.0
    image: Any = None
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, title, (_, values) in zip(axes, titles, panels, strict=True):
        grid = np.full((max(len(rows), 1), columns), np.nan)
        for (layer, module), value in values.items():
            # a module outside the blocks has no column and fills its row
            column = slice(None) if layer is None else layers.index(layer)
            grid[rows.index((layer is None, module)), column] = value
        image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        axis.set_yticks(range(len(rows)), shown, fontsize=8, **_LITERAL)
        step = max(1, len(layers) // 15)
        axis.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
        axis.set_title(title, fontsize=10, loc="left", **_LITERAL)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_xticks(np.arange(-0.5, columns), minor=True)
        axis.set_yticks(np.arange(-0.5, max(len(rows), 1)), minor=True)
        axis.grid(which="minor", color="white", linewidth=0.6)
        axis.tick_params(which="minor", length=0)
    axes[-1].set_xlabel("transformer block", fontsize=9)
    bar = figure.colorbar(image, ax=list(axes), format=PercentFormatter(1, decimals=None), pad=0.02)
    bar.set_label(unit, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    if mark is not None and 0 < mark < top:
        bar.set_label(f"{unit}\n(line: {label})", fontsize=9)
        bar.ax.axhline(mark, color="white", linewidth=1.5)
    return figure


def _wrapped(text: str, width: int) -> str:
    """Wrap each line of a text to a width in characters."""
    return "\n".join(part for line in text.splitlines() for part in wrap(line, width))


def _save(figure: Any, path: Path, *, force: bool) -> None:
    from matplotlib import rc_context

    with appearing(path), atomic_file(path, replace=force) as temporary, warnings.catch_warnings():
        # characters that are missing in the font are drawn as boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        # no dates and software versions, so that the same data gives the same bytes
        metadata = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        kind = path.suffix.lower()
        with rc_context({"svg.hashsalt": "taskvec"}):
            figure.savefig(temporary, format=kind[1:], dpi=_DPI, metadata=metadata[kind])
