"""Every merge method equals its dense definition; what cannot be merged is refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import merge_oracle as naive
from support import oracle
from support.building import BASE, sparse, tensor, vector_of, write_checkpoint
from support.commands import ok, refused

import taskvec
from taskvec import TaskVector, apply, diff, merge
from taskvec.errors import BaseMismatchError, MergeError, UsageError
from taskvec.merging import METHODS, Aligned, merge_method
from taskvec.vectors.align import align, tensors_on
from taskvec_formats import Identity, ModelFolder, SparseTensor
from taskvec_formats.forms import BLOCK_ELEMENTS

pytestmark = pytest.mark.slow

SHAPE = (3, 4)
# their coefficients are sums in f64, which a naive definition need not add in the same order
SPHERICAL = ("nuslerp", "multislerp", "model_stock")
# few distinct values, so that sums cancel, and some that do not add up exactly
VALUES = st.sampled_from([0.0, 1.0, -1.0, 0.5, -2.0]) | st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
WEIGHTS = st.integers(-20, 20).map(lambda tenths: tenths / 10)
TENSORS = oracle.sparse_tensors(VALUES, shape=st.just(SHAPE))
Weighted = tuple[list[SparseTensor], list[float]]


@st.composite
def meeting(draw: st.DrawFn) -> Weighted:
    """Two to four tensors whose masks are free to meet, and their weights."""
    tensors = draw(st.lists(TENSORS, min_size=2, max_size=4))
    return tensors, draw(st.lists(WEIGHTS, min_size=len(tensors), max_size=len(tensors)))


@st.composite
def separate(draw: st.DrawFn) -> Weighted:
    """The entries of one tensor dealt out to two to four, and their weights."""
    whole = draw(TENSORS)
    count = draw(st.integers(2, 4))
    owners = np.array(draw(st.lists(st.integers(0, count - 1), min_size=len(whole), max_size=len(whole))), int)
    parts = [SparseTensor(SHAPE, whole.indices[owners == i], whole.values[owners == i]) for i in range(count)]
    return parts, draw(st.lists(WEIGHTS, min_size=count, max_size=count))


def vectors_of(tensors: Sequence[SparseTensor]) -> list[TaskVector]:
    return [vector_of({"w": each}, name=f"vector {i}") for i, each in enumerate(tensors)]


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any], Sequence[float] | None]:
    """A method, options that it has, and a density for each vector where it prunes."""
    method = draw(st.sampled_from([name for name in METHODS if name not in SPHERICAL]))
    known = METHODS[method].options
    choices = {
        "dialect": st.sampled_from(["reference", "mergekit", "peft"]),
        "elect": st.sampled_from(["mass", "frequency"]),
        "normalize": st.booleans(),
        "on_overlap": st.sampled_from(["error", "sum", "mean", "larger", "first"]),
        "rescale": st.sampled_from(["none", "density", "norm"]),
        "seed": st.integers(0, 3),
        "gamma": st.sampled_from([0.0, 0.01, 0.1, 0.5]),
        "epsilon": st.sampled_from([0.0, 0.03, 0.09]),
        "r": st.sampled_from([0.0, 0.5]),
        "alpha": st.sampled_from([0.0, 0.2, 3.0]),
        "select_topk": st.sampled_from([0.0, 0.2, 0.5, 1.0]),
        "t": st.sampled_from([0.0, 0.1, 1.0, 100.0]),
    }
    options = {name: draw(values) for name, values in choices.items() if name in known and draw(st.booleans())}
    if METHODS[method].prune is None:
        return method, options, None
    densities = st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.9, 1.0])
    if method.startswith("della"):
        options.setdefault("epsilon", 0.05)
        densities = st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9, 1.0])
    return method, options, draw(st.lists(densities, min_size=4, max_size=4))


def expected(
    method: str, options: dict[str, Any], densities: Sequence[float] | None, weighted: Weighted
) -> dict[int, float] | None:
    tensors, weights = weighted
    if densities is not None:
        tensors = [
            naive.pruned(method, number, tensor, "w", density, options)
            for number, (tensor, density) in enumerate(zip(tensors, densities, strict=False))
        ]
    return naive.combined(method, tensors, weights, options)


@settings(max_examples=1000)
@given(meeting() | separate(), requests())
def test_a_method_equals_its_dense_definition(weighted: Weighted, request: Any) -> None:
    method, options, densities = request
    tensors, weights = weighted
    if METHODS[method].count[1] == 1:
        tensors, weights = tensors[:1], weights[:1]
    if not METHODS[method].weighs:
        weights = [1.0] * len(tensors)
    wanted = expected(method, options, densities, (tensors, weights))
    density = None if densities is None else densities[: len(tensors)]
    merged = merge(vectors_of(tensors), method, weights if METHODS[method].weighs else None, density=density, **options)
    if wanted is None:
        with pytest.raises(MergeError, match=r"^tensor 'w': (\d+ positions are held by more|the weights add up to 0)"):
            merged["w"]
        return
    assert oracle.entries(merged["w"]) == wanted
    assert (merged["w"].shape, merged["w"].values.dtype) == (SHAPE, np.float32)
    assert len(merged.change("w").replacements) == 0


def dense(tensors: Sequence[SparseTensor]) -> np.ndarray:
    """Return whole tensors as rows, f64 [tensors, size]."""
    found = np.zeros((len(tensors), tensors[0].size))
    for row, each in zip(found, tensors, strict=True):
        row[each.indices] = each.values
    return found


@given(meeting())
def test_spherical_methods_equal_their_dense_definitions(weighted: Weighted) -> None:
    tensors, _ = weighted
    rows = dense(tensors)
    lengths = np.linalg.norm(rows, axis=1)
    largest = float(lengths.max()) + 1e-30
    close = {"rtol": 1e-4, "atol": 1e-5 * largest}

    def found(method: str, weights: list[float] | None, count: int | None = None) -> np.ndarray:
        return dense([merge(vectors_of(tensors[:count]), method, weights)["w"]])[0]

    with np.errstate(all="ignore"):
        cosines = np.clip(rows @ rows.T / np.outer(lengths, lengths), -1, 1)
    if lengths[:2].all() and 1 - cosines[0, 1] ** 2 > 1e-6:
        theta = np.arccos(cosines[0, 1])
        wanted = (np.sin(0.75 * theta) * rows[0] + np.sin(0.25 * theta) * rows[1]) / np.sin(theta)
        np.testing.assert_allclose(found("nuslerp", [0.3, 0.1], 2), wanted, **close)
    if lengths.all() and lengths.max() < 1e3 * lengths.min():
        count = len(rows)
        shared = np.mean([cosines[i, j] for i in range(count) for j in range(i + 1, count)])
        if abs(1 + (count - 1) * shared) > 0.1:
            t = count * shared / (1 + (count - 1) * shared)
            np.testing.assert_allclose(found("model_stock", None), t * rows.mean(axis=0), **close)
        weights = np.arange(1, count + 1) / np.arange(1, count + 1).sum()
        units = rows / lengths[:, None]
        mean = weights @ units
        if np.linalg.norm(mean) > 0.1:
            mean = mean / np.linalg.norm(mean)
            tangent = weights @ (units - np.outer(units @ mean, mean))
            size = np.linalg.norm(tangent) + 1e-8
            wanted = (mean * np.cos(size) + tangent * np.sin(size) / size) * (weights @ lengths)
            np.testing.assert_allclose(found("multislerp", [float(n) for n in range(1, count + 1)]), wanted, **close)


@pytest.mark.parametrize(
    ("method", "vectors", "options", "message"),
    [
        ("nuslerp", 3, {}, "nuslerp merges 2 vectors, found 3"),
        ("model_stock", 1, {}, "model_stock merges at least 2 vectors, found 1"),
        ("nearswap", 2, {}, "nearswap merges 1 vector, found 2"),
        ("sce", 2, {"weights": [1, 1]}, "sce does not use `weights`: leave them out"),
        (
            "della",
            2,
            {"density": 0.1},
            "density of vector 0 is 0.1 and `epsilon` is 0.15: density − epsilon must be above 0",
        ),
        ("nearswap", 1, {"t": -1}, "`t` must be at least 0, found -1"),
        ("sce", 2, {"select_topk": 2}, "`select_topk` must be at least 0 and at most 1, found 2"),
    ],
)
def test_a_method_refuses_what_it_cannot_merge(
    method: str, vectors: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        merge(vectors_of([sparse((2,), {0: 1})] * vectors), method, **options)


@given(separate())
def test_where_masks_do_not_meet_ties_keeps_every_weighted_value(weighted: Weighted) -> None:
    tensors, weights = weighted
    by_ties, by_union = (merge(vectors_of(tensors), method, weights)["w"] for method in ("ties", "disjoint"))
    moved = by_union.values != 0
    assert oracle.exact(by_ties) == oracle.exact(SparseTensor(SHAPE, by_union.indices[moved], by_union.values[moved]))


@pytest.mark.parametrize("method", ["linear", "disjoint", "ties"])
@given(weighted=separate())
def test_where_masks_do_not_meet_the_order_does_not_matter(method: str, weighted: Weighted) -> None:
    tensors, weights = weighted
    forth = merge(vectors_of(tensors), method, weights)["w"]
    back = merge(vectors_of(tensors[::-1]), method, weights[::-1])["w"]
    assert oracle.exact(forth) == oracle.exact(back)


@given(meeting() | separate())
def test_auto_takes_the_union_unless_masks_meet_and_says_why(weighted: Weighted) -> None:
    tensors, weights = weighted
    merged = merge(vectors_of(tensors), weights=weights)
    positions = [position for each in tensors for position in each.indices.tolist()]
    if len(positions) == len(set(positions)):
        chosen = ("disjoint", "no two masks share a position")
    else:
        chosen = ("ties", "the masks meet, first in w")
    assert (merged.provenance["method"], merged.provenance["reason"]) == chosen
    assert oracle.entries(merged["w"]) == naive.combined(chosen[0], tensors, weights, {})


@given(meeting(), requests(), st.sampled_from([0.0, 0.5, -2.0, 1.1]))
def test_lambda_is_a_factor_of_the_whole(weighted: Weighted, request: Any, lam: float) -> None:
    method, options, densities = request
    if method == "disjoint":
        options = {**options, "on_overlap": "sum"}
    options.pop("normalize", None)
    tensors = weighted[0][: METHODS[method].count[1]]
    density = None if densities is None else densities[: len(tensors)]
    plain, scaled = (merge(vectors_of(tensors), method, density=density, lam=x, **options)["w"] for x in (1.0, lam))
    assert scaled.indices.tolist() == plain.indices.tolist()
    assert scaled.values.tobytes() == (plain.values * np.float32(lam)).tobytes()


def test_a_mean_of_agreeing_values_is_not_pulled_down_by_the_outvoted() -> None:
    a, b, c = sparse((3,), {0: 3, 1: 1}), sparse((3,), {0: 1, 1: -1}), sparse((3,), {0: -2, 2: 5})
    assert oracle.entries(merge(vectors_of([a, b, c]), "ties")["w"]) == {0: 2.0, 2: 5.0}


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ((4, -1, -2), (0.5, 1, 1), (-1.5, -1.5, 2)),
        ((4, 2), (0.5, 1), (2, 8 / 3, 2)),
        ((4, -4), (1, 1), (None, 4, 4)),
        ((4,), (0.5,), (2, 4, 2)),
    ],
)
def test_the_dialects_differ_as_the_documentation_says(
    values: Sequence[float], weights: Sequence[float], expected: Sequence[float | None]
) -> None:
    vectors = vectors_of([sparse((1,), {0: value}) for value in values])
    for dialect, number in zip(("reference", "mergekit", "peft"), expected, strict=True):
        found = oracle.entries(merge(vectors, "ties", weights, dialect=dialect)["w"])
        assert found == ({} if number is None else {0: float(np.float32(number))})


def test_a_weight_is_not_divided_out_where_one_vector_stands_alone() -> None:
    a, b = sparse((2,), {0: 3}), sparse((2,), {1: 4})
    assert oracle.entries(merge(vectors_of([a, b]), "ties", [0.5, -2])["w"]) == {0: 1.5, 1: -8.0}


def test_a_tensor_that_few_vectors_hold_is_merged_from_those() -> None:
    vectors = [
        vector_of({"a": sparse((2,), {0: 1})}),
        vector_of({"a": sparse((2,), {0: 1}), "b": sparse((3,), {2: 4})}),
    ]
    merged = merge(vectors, "linear", [2, 3])
    assert {name: oracle.entries(merged[name]) for name in merged} == {"a": {0: 5.0}, "b": {2: 12.0}}


def test_the_provenance_names_method_weights_and_parents() -> None:
    parents = [vector_of({"w": sparse((2,), {0: 1})}, name=name) for name in ("a.lota", "b.lota")]
    parents[0].provenance.update(made_by="train", name="another", digest="another")
    assert merge(parents, "linear", [1, 0.5]).provenance == {
        "made_by": "merge",
        "method": "linear",
        "reason": "asked for",
        "weights": [1, 0.5],
        "lambda": 1.0,
        "options": {"normalize": False},
        "notes": [],
        "parents": [
            {"name": "a.lota", "digest": parents[0].digest},
            {"name": "b.lota", "digest": parents[1].digest},
        ],
        "ancestors": {parents[0].digest: {"made_by": "train", "name": "another", "digest": "another"}},
    }


@pytest.mark.parametrize("method", ["auto", "linear", "average", "disjoint", "ties"])
def test_one_vector_merges_to_itself(method: str) -> None:
    only = sparse((5,), {1: 2, 3: -4})
    merged = merge(vectors_of([only]), method)
    assert oracle.exact(merged["w"]) == oracle.exact(only)
    assert merged.base == BASE


def test_a_saved_merge_is_the_lazy_one(tmp_path: Path) -> None:
    vectors = vectors_of([sparse((4,), {0: 1, 2: -1}), sparse((4,), {2: 3, 3: 0})])
    merged = merge(vectors)
    merged.save(tmp_path / "merged.lota")
    opened = TaskVector.open(tmp_path / "merged.lota")
    assert opened.provenance == merged.provenance
    assert oracle.exact(opened["w"]) == oracle.exact(merged["w"])


def test_a_merge_of_packed_vectors_applies_to_their_base(tmp_path: Path) -> None:
    values = {"base": [1.0, 2, 3, 4], "first": [1.5, 2, 3, 4], "second": [1.0, 2, 2.5, 4]}
    states = {name: write_checkpoint(tmp_path / name, {"w": tensor("F32", v)}) for name, v in values.items()}
    vectors = [diff(states["base"], states[name]) for name in ("first", "second")]
    apply(merge(vectors, weights=[1, 2]), states["base"], tmp_path / "out")
    assert ModelFolder(tmp_path / "out").bits("w").view(np.float32).tolist() == [1.5, 2, 2, 4]


def test_vectors_of_different_bases_are_refused() -> None:
    delta = {"w": sparse((2,), {0: 1})}
    other = vector_of(delta, Identity("other", "0" * 64))
    with pytest.raises(BaseMismatchError, match=r"different bases: base \(ba5e.*\) and other \(0000"):
        merge([vector_of(delta), other])


def test_tensors_of_different_shapes_are_refused_by_name() -> None:
    with pytest.raises(BaseMismatchError, match=r"'w' is F32 \[2\] in one vector and F32 \[1, 2\] in another"):
        merge(vectors_of([sparse((2,), {0: 1}), sparse((1, 2), {0: 1})]))


def test_changes_that_cannot_be_added_are_refused_by_name(tmp_path: Path) -> None:
    base, tuned = (write_checkpoint(tmp_path / f"{v}", {"ids": tensor("I64", [v])}) for v in (1, 2))
    with pytest.raises(MergeError, match="'ids' is I64: its changes cannot be added"):
        merge([diff(base, tuned)])


@pytest.mark.parametrize("method", ["linear", "average", "disjoint", "ties"])
def test_a_sum_beyond_the_largest_f32_is_refused_by_name(method: str) -> None:
    merged = merge(vectors_of([sparse((2,), {0: 1}), sparse((2,), {1: 3e38})]), method, [1, 2])
    if method == "average":
        merged = merge(vectors_of([sparse((2,), {1: 3e38}), sparse((2,), {1: 3e38})]), method)
    with pytest.raises(MergeError, match="tensor 'w'"):
        merged["w"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "slerp"}, "no merge method 'slerp'; the methods are auto, linear, average, disjoint, ties"),
        ({"weights": [1.0]}, "1 weights for 2 vectors"),
        ({"weights": []}, "0 weights for 2 vectors"),
        ({"weights": [1.0, float("nan")]}, "finite number, found nan"),
        ({"weights": [float("-inf"), 1.0]}, "finite number, found -inf"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    vectors = vectors_of([sparse((2,), {0: 1}), sparse((2,), {1: 1})])
    with pytest.raises(UsageError, match=message):
        merge(vectors, **options)


def test_nothing_cannot_be_merged() -> None:
    with pytest.raises(UsageError, match="at least one vector"):
        merge([])


@pytest.mark.parametrize("method", METHODS)
def test_no_method_changes_its_inputs(method: str) -> None:
    tensors = [sparse((4,), {0: 1, 2: -1}), sparse((4,), {1: 3})]
    tensors = tensors[: METHODS[method].count[1]]
    before = [oracle.exact(each) for each in tensors]
    density = 0.5 if METHODS[method].prune else None
    weights = [2.0, 3.0] if METHODS[method].weighs else None
    assert len(merge(vectors_of(tensors), method, weights, density=density)["w"].indices) <= 3
    assert [oracle.exact(each) for each in tensors] == before


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("linear", {"density": 0.5}, "linear has no density: it prunes nothing"),
        ("linear", {"elect": "mass"}, "linear has no option `elect`; it has `normalize`"),
        ("average", {"normalize": True}, "average has no option `normalize`; it has none"),
        (
            "magnitude_prune",
            {"density": 0.5, "dialect": "peft"},
            "magnitude_prune has no option `dialect`; it has `density`, `normalize`, `rescale`",
        ),
        ("magnitude_prune", {}, "magnitude_prune needs a density"),
        ("dare_linear", {}, "dare_linear needs a density"),
        ("ties", {"dialect": "swabian"}, "`dialect` is one of reference, mergekit, peft, found 'swabian'"),
        ("ties", {"elect": "lot"}, "`elect` is one of mass, frequency, found 'lot'"),
        ("ties", {"normalize": "yes"}, "`normalize` must be True or False, found 'yes'"),
        ("ties", {"density": 1.5}, "expected a share of the weights between 0 and 1, found 1.5"),
        ("ties", {"density": [0.5]}, "1 densities for 2 vectors"),
        ("ties", {"rescale": "twice"}, "`rescale` is one of none, density, norm, found 'twice'"),
        ("breadcrumbs", {"density": 0.5, "gamma": 1}, "`gamma` must be at least 0 and below 1, found 1"),
        (
            "breadcrumbs",
            {"density": 0.5, "gamma": "all"},
            "`gamma` must be a number, found",
        ),
        ("dare_linear", {"density": 0.5, "seed": "x"}, "`seed` must be a whole number, found 'x'"),
        ("ties", {"dialect": ["peft"]}, r"`dialect` is one of reference, mergekit, peft, found \['peft'\]"),
        ("disjoint", {"on_overlap": "fight"}, "`on_overlap` is one of error, sum, mean, larger, first"),
        ("disjoint", {"on-overlap": "sum"}, "disjoint has no option `on-overlap`; it is spelled `on_overlap`$"),
        ("linear", {"lambda_": 1}, "linear has no option `lambda_`; λ is `lam`$"),
        ("linear", {"lambda": 1}, "linear has no option `lambda`; λ is `lam`$"),
        ("auto", {"lambda_": 1}, "auto has no option `lambda_`; λ is `lam`$"),
        ("auto", {"density": 0.5}, "auto chooses the method and takes no options"),
        ("linear", {"lam": float("nan")}, "expected a finite number, found nan"),
    ],
)
def test_options_that_a_method_does_not_have_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    vectors = vectors_of([sparse((2,), {0: 1}), sparse((2,), {1: 1})])
    with pytest.raises(UsageError, match=message):
        merge(vectors, method, **options)


def stored(folder: Path, *tensors: SparseTensor) -> list[TaskVector]:
    """Vectors that know how many entries they have."""
    for number, each in enumerate(tensors):
        vector_of({"w": each}).save(folder / f"{number}.lota")
    return [TaskVector.open(folder / f"{number}.lota") for number in range(len(tensors))]


def test_a_density_above_the_vectors_own_is_said_to_trim_nothing(tmp_path: Path) -> None:
    vectors = stored(tmp_path, sparse((10,), {0: 1, 1: 2}), sparse((10,), {2: 1, 3: 1, 4: 1, 5: 3}))
    wanted = ["density 0.2 trims nothing from 0.lota, whose own density is 20.00%"]
    for dialect in ("reference", "mergekit", "peft"):
        assert merge(vectors, "ties", density=0.2, dialect=dialect).provenance["notes"] == wanted
    assert merge(vectors, "magnitude_prune", density=0.2).provenance["notes"] == wanted
    assert len(merge(vectors, "ties", density=0.9).provenance["notes"]) == 2
    assert merge(vectors, "ties", density=0.1).provenance["notes"] == []
    assert merge(vectors, "ties").provenance["notes"] == []


def test_breadcrumbs_says_what_its_settings_do_not_do(tmp_path: Path) -> None:
    vectors = stored(tmp_path, sparse((10,), {0: 1, 1: 2, 2: 3, 3: 4}))
    assert merge(vectors, "breadcrumbs", density=0.2, gamma=0.1).provenance["notes"] == []
    idle = "density 0.3 trims nothing from 0.lota, whose own density is 40.00%"
    assert merge(vectors, "breadcrumbs", density=0.3, gamma=0.1).provenance["notes"] == [idle]
    fewer, idle = merge(vectors, "breadcrumbs", density=0.95, gamma=0.2).provenance["notes"]
    assert fewer == (
        "the density and a gamma of 0.2 add up to more than 1: fewer of the largest changes of 0.lota are dropped"
    )
    assert idle.startswith("density 0.95 trims nothing")


@pytest.mark.parametrize(("name", "reason"), [("v", "it has no tensor 'w'"), ("w", "tensor 'w' should be .*, found ")])
def test_a_base_that_does_not_fit_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    vectors = stored(tmp_path, sparse((10,), {0: 1}), sparse((10,), {1: 1}))
    base = write_checkpoint(tmp_path / "other", {name: tensor("F32", [1.0])})
    with pytest.raises(BaseMismatchError, match=f"^other is not the base of 0.lota .*: {reason}"):
        merge(vectors, base=base)


def test_weights_that_normalizing_divides_out_are_said_to_have_no_effect() -> None:
    apart = vectors_of([sparse((4,), {0: 1}), sparse((4,), {1: 2})])
    merged = merge(apart, "ties", [0.5, -3], dialect="mergekit")
    assert merged.provenance["notes"] == [
        "no two masks share a position, so normalizing by weight cancels the weights: they have no effect"
    ]
    assert oracle.entries(merged["w"]) == {0: 1, 1: 2}
    meeting_ones = vectors_of([sparse((4,), {0: 1}), sparse((4,), {0: 2})])
    for vectors, options in (
        (apart, {"dialect": "reference"}),
        (apart, {"dialect": "mergekit", "normalize": False}),
        (meeting_ones, {"dialect": "mergekit"}),
    ):
        assert merge(vectors, "ties", [0.5, -3], **options).provenance["notes"] == []


@given(meeting(), st.sampled_from(["linear", "average", "ties", "disjoint"]))
def test_the_functions_compute_with_torch_what_they_compute_with_numpy(weighted: Weighted, method: str) -> None:
    tensors, weights = weighted
    function = METHODS[method].combine
    every: list[dict[str, Any]] = [{}]
    if method == "ties":
        every = [{"dialect": d, "elect": e} for d in ("reference", "mergekit", "peft") for e in ("mass", "frequency")]
    if method == "disjoint":
        every = [{"on_overlap": policy} for policy in ("sum", "mean", "larger", "first")]
    if method == "average":
        every, weights = [{"normalize": True}], [abs(weight) + 1 for weight in weights]
    for options in every:
        by_numpy = function(align(tensors, weights), **options)
        by_torch = function(align(tensors, weights, tensors_on("cpu")), **options)
        assert oracle.exact(by_torch) == oracle.exact(by_numpy)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_merge_on_a_device_saves_the_same_file(method: str, tmp_path: Path) -> None:
    step = 2 if method == "disjoint" else 1
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{n}.lota" for n in range(2)]
    for n, file in enumerate(files):
        entries = {position: float(rng.normal()) for position in range(n, 600, step) if step > 1 or rng.random() < 0.5}
        vectors_of([sparse((600,), entries)])[0].save(file)
    options = {"density": 0.3} if METHODS[method].prune else {}
    weights = [0.7, 1.3] if METHODS[method].weighs else None
    files = files[: METHODS[method].count[1]]
    outputs = [tmp_path / "numpy.lota", tmp_path / "torch.lota"]
    for output, device in zip(outputs, (None, "cpu"), strict=True):
        taskvec.merge(files, method, weights, lam=0.9, device=device, **options).save(output)
    assert TaskVector.open(outputs[0])["w"].values.any()
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:99", "there is no device cuda:99 here"), ("gpu", "`device` is one of auto, cpu")]
)
def test_a_device_that_does_not_exist_is_refused(device: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge(vectors_of([sparse((3,), {0: 1})]), "linear", device=device)


@pytest.fixture
def median() -> Iterator[str]:
    """A method of somebody else's, as in docs/merging.md."""

    @merge_method("median", source="https://example.org", summary="the median of those that hold a position")
    def median(vectors: Aligned, *, least: int = 1) -> SparseTensor:
        values = np.stack([vectors.weighted(part) for part in vectors.parts])
        values[values == 0] = np.nan
        middle = np.nanmedian(values, axis=0)
        return vectors.result(middle, vectors.count() >= least)

    yield "median"
    del METHODS["median"]


def test_a_method_of_ones_own_merges_and_has_options(median: str) -> None:
    tensors = [sparse((3,), {0: 1, 1: 5}), sparse((3,), {0: 3}), sparse((3,), {0: 9, 2: 1})]
    assert oracle.entries(merge(vectors_of(tensors), median)["w"]) == {0: 3, 1: 5, 2: 1}
    assert oracle.entries(merge(vectors_of(tensors), median, [1, 1, 2], lam=2, least=2)["w"]) == {0: 6}
    with pytest.raises(UsageError, match="median has no option `most`; it has `least`"):
        merge(vectors_of(tensors), median, most=2)
    with pytest.raises(UsageError, match="a merge method 'ties' is already registered"):
        merge_method("ties")(lambda vectors: vectors)


def test_a_method_may_ask_for_whole_tensors() -> None:
    sizes: list[int] = []

    @merge_method("largest", whole_tensors=True)
    def largest(vectors: Aligned) -> SparseTensor:
        total = vectors.total()
        sizes.append(math.prod(vectors.shape))
        return vectors.result(total, abs(total) == abs(total).max())

    try:
        size = 3 * BLOCK_ELEMENTS
        merged = merge(vectors_of([sparse((size,), {1: 1, size - 1: -5}), sparse((size,), {1: 2})]), "largest")
        assert oracle.entries(merged["w"]) == {size - 1: -5}
        assert oracle.entries(merged.change("w", size - 2, size).delta) == {1: -5}
        assert sizes == [size]
    finally:
        del METHODS["largest"]


def test_blocks_and_pieces_merge_to_the_same_tensor(tmp_path: Path) -> None:
    size = BLOCK_ELEMENTS + 5
    dice = np.random.default_rng(0)
    tensors = []
    for _ in range(3):
        indices = np.flatnonzero(dice.random(size) < 0.01)
        tensors.append(SparseTensor((size,), indices, dice.choice([1.0, -1, 2, 3], len(indices)).astype(np.float32)))
    for method in METHODS:
        options: dict[str, Any] = {"density": 0.005} if METHODS[method].prune else {}
        if method == "disjoint":
            options = {"on_overlap": "sum"}
        if method.startswith("della"):
            options["epsilon"] = 0.001
        weights = [1, 0.5, 0.3] if METHODS[method].weighs else None
        count = METHODS[method].count[1]
        merged = merge(vectors_of(tensors[:count]), method, weights and weights[:count], **options)
        whole = merged["w"]
        parts = [
            (start, merged.change("w", start, stop).delta) for start, stop in ((0, 7), (7, size - 3), (size - 3, size))
        ]
        assert oracle.exact(whole) == oracle.exact(SparseTensor.concat(parts, 0, size, np.float32)), method


@pytest.mark.parametrize("threads", ["1", "3"])
def test_what_dare_drops_depends_on_nothing_but_seed_vector_tensor_and_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: str
) -> None:
    monkeypatch.setenv("TASKVEC_THREADS", threads)
    size = BLOCK_ELEMENTS * 2
    indices = np.arange(0, size, 997)
    tensor_ = SparseTensor((size,), indices, np.ones(len(indices), np.float32))
    vectors = [vector_of({"a": tensor_, "b": tensor_}), vector_of({"a": tensor_, "b": tensor_})]
    merged = merge(vectors, "dare_linear", density=0.3, seed=7, rescale="none")
    merged.save(tmp_path / "m.lota")
    kept = TaskVector.open(tmp_path / "m.lota")
    expected = [
        {p for p in indices.tolist() if any(naive.stays(7, number, name, p, 0.3) for number in (0, 1))} for name in "ab"
    ]
    assert [set(kept[name].indices.tolist()) for name in "ab"] == expected
    assert expected[0] != expected[1]
    assert 0.4 < len(expected[0]) / len(indices) < 0.6  # 1 − 0.7²


def test_the_help_names_every_method() -> None:
    from taskvec_cli.merge import merge as command

    said = command.__annotations__["method"].__metadata__[0].help
    assert all(name in said for name in METHODS)


def test_a_factor_that_leads_out_of_f32_is_refused_by_name() -> None:
    with pytest.raises(MergeError, match=r"^tensor 'w': the values times λ = 1e\+38 leave the range of f32"):
        merge(vectors_of([sparse((2,), {0: 1e10})]), "linear", lam=1e38)["w"]


THEIRS = """
from typing import Annotated, Literal
from taskvec.merging import Bounds, merge_method

@merge_method("theirs")
def theirs(vectors, *, share: Annotated[float, Bounds(0, 1)] = 0.5, mode: Literal["keep", "negate"] = "keep"):
    return vectors.result(vectors.total() * (share if mode == "keep" else -share))
"""


def test_methods_of_another_package_have_options_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python, a recipe and the command line."""
    (tmp_path / "theirs.py").write_text(THEIRS)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[taskvec.merge_methods]\ntheirs = theirs:theirs\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        vectors = vectors_of([sparse((2,), {0: 3})])
        assert oracle.entries(merge(vectors, "theirs")["w"]) == {0: 1.5}
        assert oracle.entries(merge(vectors, "theirs", share=np.float32(0.25), mode="negate")["w"]) == {0: -0.75}
        for options, complaint in (
            ({"share": 2}, "`share` must be at least 0 and at most 1, found 2"),
            ({"share": "all"}, "`share` must be a number, found 'all'"),
            ({"mode": "drop"}, "`mode` is one of keep, negate, found 'drop'"),
            ({"gamma": 0.5}, "theirs has no option `gamma`; it has `mode`, `share`"),
        ):
            with pytest.raises(UsageError, match=complaint):
                merge(vectors, "theirs", **options)
        vectors[0].save(tmp_path / "one.lota")
        chosen = ["--option", "share=0.25", "--option", "mode=negate"]
        ok("merge", tmp_path / "one.lota", "--method", "theirs", *chosen, "-o", tmp_path / "command.lota")
        (tmp_path / "recipe.yaml").write_text(
            f"merge_method: theirs\nmodels:\n- model: {tmp_path}/one.lota\n  parameters: {{share: 0.25}}\n"
            "parameters: {mode: negate}\n"
        )
        ok("merge", "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "recipe.lota")
        for name in ("command", "recipe"):
            assert oracle.entries(TaskVector.open(tmp_path / f"{name}.lota")["w"]) == {0: -0.75}
        common = ("merge", tmp_path / "one.lota", "--method", "theirs", "-o", tmp_path / "x.lota", "--option")
        assert "`share` must be a number, found 'x'" in refused(2, *common, "share=x")
        assert "--option takes KEY=VALUE, found 'share'" in refused(2, *common, "share")
        assert "theirs has no option 'gamma'" in refused(2, *common, "gamma=1")
        assert "option 'share' is given twice" in refused(2, *common, "share=1", "--option", "share=0")
        without = ("merge", tmp_path / "one.lota", "-o", tmp_path / "x.lota", "--option", "share=1")
        assert "--option needs --method" in refused(2, *without)
    finally:
        del METHODS["theirs"]
