"""Overlap counts equal those of Python sets; the pictures of it are repeatable."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from support.building import sparse, vector_of
from support.oracle import entries, sparse_tensors

from taskvec import TaskVector, overlap
from taskvec.analysis.overlap import Cell, meet
from taskvec.analysis.plots import plot_density, plot_overlap
from taskvec.errors import BaseMismatchError, UsageError
from taskvec_formats import SparseTensor

SHAPES = {
    "model.embed_tokens.weight": (6,),
    "model.layers.0.mlp.up_proj.weight": (3, 4),
    "model.layers.0.mlp.experts.1.weight": (5,),
    "model.layers.1.mlp.up_proj.weight": (3, 4),
    "model.layers.1.mlp.up_proj.bias": (0,),
}
PLACES = {
    "model.embed_tokens.weight": (None, "model.embed_tokens"),
    "model.layers.0.mlp.up_proj.weight": (0, "mlp.up_proj"),
    "model.layers.0.mlp.experts.1.weight": (0, "mlp.experts.*"),
    "model.layers.1.mlp.up_proj.weight": (1, "mlp.up_proj"),
    "model.layers.1.mlp.up_proj.bias": (1, "mlp.up_proj.bias"),
}
VALUES = st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-10, 10, width=32)


@st.composite
def vectors(draw: st.DrawFn) -> TaskVector:
    """A vector with some of the tensors."""
    names = draw(st.sets(st.sampled_from(sorted(SHAPES))))
    return vector_of({name: draw(sparse_tensors(VALUES, shape=st.just(SHAPES[name]))) for name in sorted(names)})


Flat = dict[tuple[str, int], float]


def flat(vector: TaskVector) -> Flat:
    """(tensor name, position) -> value."""
    return {(name, position): value for name in vector for position, value in entries(vector[name]).items()}


def cell(a: Flat, b: Flat) -> Cell:
    both = a.keys() & b.keys()
    conflicts = sum(1 for key in both if a[key] * b[key] < 0)
    return Cell(len(a), len(b), len(both), conflicts)


def norm(vector: Flat) -> float:
    return math.sqrt(sum(value * value for value in vector.values()))


@settings(max_examples=60)
@given(st.lists(vectors(), min_size=2, max_size=3))
def test_every_pair_is_counted_as_by_sets(many: list[TaskVector]) -> None:
    results = overlap(many)
    assert [(pair.a, pair.b) for pair in results] == list(combinations(range(len(many)), 2))
    for pair in results:
        a, b = flat(many[pair.a]), flat(many[pair.b])
        assert pair.total == cell(a, b)
        assert pair.total.union == len(a.keys() | b.keys())
        assert pair.total.jaccard == (len(a.keys() & b.keys()) / len(a.keys() | b.keys()) if a or b else 0)

        dot = sum(a[key] * b[key] for key in a.keys() & b.keys())
        assert pair.cosine == pytest.approx(dot / (norm(a) * norm(b)) if norm(a) * norm(b) else 0, abs=1e-9)

        eligible = sum(math.prod(SHAPES[name]) for name in set(many[pair.a]) | set(many[pair.b]))
        chance = len(a) * len(b) / eligible if eligible else 0
        expected = chance / (len(a) + len(b) - chance) if a or b else 0
        assert pair.expected_jaccard == pytest.approx(expected)


@settings(max_examples=60)
@given(vectors(), vectors())
def test_places_divide_the_total(first: TaskVector, second: TaskVector) -> None:
    (pair,) = overlap([first, second])
    a, b = flat(first), flat(second)
    assert pair.modules.keys() == {PLACES[name] for name in set(first) | set(second)}
    for place, found in pair.modules.items():
        here = [{key: value for key, value in side.items() if PLACES[key[0]] == place} for side in (a, b)]
        assert found == cell(*here)
    assert sum(pair.modules.values(), Cell()) == pair.total


@settings(max_examples=60)
@given(*2 * [sparse_tensors(shape=st.just((3, 4)))])
def test_tensors_meet_where_they_share_a_position(a: SparseTensor, b: SparseTensor) -> None:
    assert meet(a, b) == meet(b, a) == bool(set(a.indices.tolist()) & set(b.indices.tolist()))


def test_a_vector_covers_itself_and_opposes_its_negative() -> None:
    one, other = vector_of({"w": sparse((9,), {1: 2, 3: -1})}), vector_of({"w": sparse((9,), {1: -2, 3: 1})})
    with_itself, with_its_negative = overlap([one, one])[0], overlap([one, other])[0]
    assert (with_itself.total.jaccard, with_itself.cosine) == (1, pytest.approx(1))
    assert (with_its_negative.total.sign_conflicts, with_its_negative.cosine) == (2, pytest.approx(-1))


def test_one_vector_has_no_pairs() -> None:
    assert overlap([vector_of({})]) == []


@pytest.fixture
def pair() -> list[TaskVector]:
    names = [name for name, shape in SHAPES.items() if shape != (0,)]
    entries_of_each = ({0: 1, 2: -1}, {2: 1, 3: -1})
    return [vector_of({name: sparse(SHAPES[name], held) for name in names}) for held in entries_of_each]


Draw = Callable[[list[TaskVector], Path], None]


def draw_overlap(vectors: list[TaskVector], path: Path) -> None:
    plot_overlap(["a"] * len(vectors), overlap(vectors), path)


def draw_density(vectors: list[TaskVector], path: Path) -> None:
    plot_density("a", vectors[0], path)


both = pytest.mark.parametrize("draw", [draw_overlap, draw_density])


@both
@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".PNG"])
def test_the_same_masks_give_the_same_picture(draw: Draw, suffix: str, pair: list[TaskVector], tmp_path: Path) -> None:
    first, second = tmp_path / "new" / f"first{suffix}", tmp_path / f"second{suffix}"
    draw(pair, first)
    draw(pair, second)
    assert first.read_bytes() == second.read_bytes()
    assert list(first.parent.iterdir()) == [first]


@both
def test_a_picture_can_be_read(draw: Draw, pair: list[TaskVector], tmp_path: Path) -> None:
    draw(pair, tmp_path / "a.png")
    height, width, channels = imread(tmp_path / "a.png").shape
    assert (height > 100, width > 100, channels) == (True, True, 4)


def test_a_picture_shows_three_vectors_as_well(pair: list[TaskVector], tmp_path: Path) -> None:
    draw_overlap(pair, tmp_path / "one.png")
    draw_overlap([*pair, pair[0]], tmp_path / "three.png")
    assert imread(tmp_path / "three.png").shape[0] > imread(tmp_path / "one.png").shape[0]


@pytest.mark.parametrize("deltas", [{}, {"w": SparseTensor.empty((4,))}], ids=["no tensors", "no entries"])
def test_empty_vectors_can_be_drawn(deltas: dict[str, SparseTensor], tmp_path: Path) -> None:
    for draw in (draw_overlap, draw_density):
        draw([vector_of(deltas)] * 2, tmp_path / f"{draw.__name__}.png")
        assert imread(tmp_path / f"{draw.__name__}.png").size


def test_the_density_of_a_vector_does_not_depend_on_whether_it_was_saved(
    pair: list[TaskVector], tmp_path: Path
) -> None:
    pair[0].save(tmp_path / "a.lota")
    draw_density(pair, tmp_path / "in-memory.png")
    draw_density([TaskVector.open(tmp_path / "a.lota")], tmp_path / "saved.png")
    assert (tmp_path / "in-memory.png").read_bytes() == (tmp_path / "saved.png").read_bytes()


@both
@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png.txt"])
def test_another_file_type_is_refused(draw: Draw, name: str, pair: list[TaskVector], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a picture must be one of \.png, \.svg, \.pdf"):
        draw(pair, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_blocks_are_compared_one_at_a_time() -> None:
    rows = 3 << 11
    in_a = {0: 1.0, (1 << 22) - 1: 2.0, 1 << 22: -3.0, (3 << 21) - 1: 4.0}
    in_b = {(1 << 22) - 1: -2.0, 1 << 22: -1.0, (1 << 22) + 1: 5.0}
    a, b = (vector_of({"w": sparse((rows, 1 << 10), each)}) for each in (in_a, in_b))
    (pair,) = overlap([a, b])
    assert pair.total == Cell(4, 3, 2, 1)
    assert pair.cosine == pytest.approx((-4 + 3) / math.sqrt(30 * 30))


def test_a_tensor_of_another_shape_is_refused() -> None:
    a, b = (vector_of({"w": sparse(shape, {0: 1.0})}) for shape in ((2, 3), (3, 2)))
    with pytest.raises(BaseMismatchError, match=r"tensor 'w' is F32 \[2, 3\] in .* and F32 \[3, 2\] in "):
        overlap([a, b])
