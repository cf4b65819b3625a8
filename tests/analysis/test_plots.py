"""Pictures of vectors whose tensors are named as a stranger likes: names are drawn as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.axes
import matplotlib.figure
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from support.building import sparse, vector_of

from taskvec import TaskVector, overlap
from taskvec.analysis.plots import plot_density, plot_losses, plot_overlap
from taskvec.errors import UsageError

pytestmark = pytest.mark.slow

NAMES = [
    "w$_{$",
    "$x$",
    r"$\frac{$",
    r"a\b_c^{d}",
    "a\nb\rc",
    "\x1b[31mred\x1b[0m",
    "W" * 1000,
    "層",
    "a\udcffb",
    "",
    "%&#~",
]


def figure_of(monkeypatch: pytest.MonkeyPatch, draw: Callable[[], None]) -> Any:
    """Return the matplotlib figure that a function draws and saves."""
    figures: list[Any] = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure: Any, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    draw()
    (figure,) = figures
    return figure


def drawn(monkeypatch: pytest.MonkeyPatch, draw: Callable[[], None]) -> list[str]:
    """The titles and labels of a picture but for its scale of colours, as matplotlib was given them."""
    figure = figure_of(monkeypatch, draw)
    texts = [text for axis in figure.axes[:-1] for text in (axis.title, axis._left_title, *axis.get_yticklabels())]
    assert not any(text.get_parse_math() for text in texts if text.get_text())
    return [text.get_text() for text in texts]


def vector(name: str) -> TaskVector:
    return vector_of({name: sparse((4,), {0: 1}), f"model.layers.1.{name}.weight": sparse((4,), {2: 1})}, name=name)


@pytest.mark.parametrize("kind", [".png", ".svg", ".pdf"])
@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:12])
def test_any_name_is_drawn_as_text(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"x{kind}"
    texts = drawn(monkeypatch, lambda: plot_density(name, vector(name), path))
    assert path.stat().st_size > 0
    lines = [line for text in texts for line in text.split("\n")]  # titles are wrapped
    assert all(line.isprintable() and len(line) < 80 for line in lines)
    if name.isprintable() and len(name) < 40:
        assert {name, f"{name}: 2 entries, density 25.00%"} <= set(texts)
    a, b = vector(name), vector("other")
    plot_overlap([name, "other"], overlap([a, b]), tmp_path / f"pair{kind}")
    plot_losses(name, [], [1.0, 2.0], [], tmp_path / f"losses{kind}")
    assert len(list(tmp_path.iterdir())) == 3


def test_the_middle_of_a_long_name_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "begin" + "x" * 1000 + "end"
    texts = drawn(monkeypatch, lambda: plot_density("label", vector(name), tmp_path / "x.png"))
    shown = [text for text in texts if text.startswith("begin")]
    assert shown
    assert all(len(text) < 41 and text.endswith("end") and "…" in text for text in shown)


@pytest.mark.parametrize("name", ["tensor{}", "model.layers.{}.w.weight"], ids=["modules", "blocks"])
def test_a_picture_too_large_to_be_drawn_is_refused(name: str, tmp_path: Path) -> None:
    many = vector_of({name.format(number): sparse((1,), {0: 1}) for number in range(3000)})
    with pytest.raises(UsageError, match=r"^a picture of [\d,]+ modules in [\d,]+ blocks, 1 times, would be too large"):
        plot_density("many", many, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_number_too_long_to_be_that_of_a_block_is_part_of_the_name(tmp_path: Path) -> None:
    plot_density("x", vector_of({f"layers.{'9' * 5000}.w": sparse((1,), {0: 1})}), tmp_path / "x.png")


def test_a_module_in_the_blocks_and_a_tensor_of_its_name_outside_have_a_row_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids: list[Any] = []
    draw = matplotlib.axes.Axes.imshow
    monkeypatch.setattr(
        matplotlib.axes.Axes, "imshow", lambda axis, grid, **options: grids.append(grid) or draw(axis, grid, **options)
    )
    deltas = {"model.layers.0.w.weight": sparse((4,), {0: 1}), "w.weight": sparse((4,), {0: 1, 1: 1})}
    plot_density("x", vector_of(deltas), tmp_path / "x.png")
    assert grids[0].tolist() == [[0.25], [0.5]]


@pytest.mark.parametrize("module", ["w", "a_module_with_a_name_as_long_as_it_may_be"])
def test_titles_and_scales_of_a_picture_are_whole(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # one entry of 3,000 weights: a density of 0.03%
    names = ["a fine-tune of a model with a long name", "another fine-tune with an even longer name"]
    vectors = [
        vector_of({f"model.layers.0.{module}.weight": sparse((3000,), {0: 1})}),
        vector_of({f"model.layers.0.{module}.weight": sparse((3000,), {0: 1, 1: 1})}),
    ]
    for number, draw in enumerate(
        (
            lambda path: plot_density(names[0], vectors[0], path),
            lambda path: plot_overlap(names, overlap(vectors), path),
        )
    ):
        with monkeypatch.context() as patch:
            figure = figure_of(patch, lambda draw=draw, number=number: draw(tmp_path / f"{number}.png"))
        FigureCanvasAgg(figure).draw()  # places the texts
        picture = figure.bbox
        title = figure.axes[0]._left_title.get_window_extent()
        assert picture.x0 <= title.x0 < title.x1 <= picture.x1
        assert picture.y0 <= title.y0 < title.y1 <= picture.y1
        ticks = [label.get_text() for label in figure.axes[-1].get_yticklabels()]
        assert len(set(ticks)) == len(ticks) > 2


def test_steps_are_whole_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figure_of(monkeypatch, lambda: plot_losses("x", [2.5], [2.0, 1.0], [], tmp_path / "x.png"))
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())
