"""Vectors add, scale and cancel as numbers do, to the byte of the file, and nothing is read before its time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.building import BASE, sparse, tensor, write_checkpoint

from taskvec import SparseTensor, TaskVector, apply, diff, merge
from taskvec.errors import BaseMismatchError, KindError, MergeError, UsageError
from taskvec.vectors.source import DeltaSource, no_replacements
from taskvec_formats import Change, Form, Header, Identity, ModelFolder, TensorSpec
from taskvec_formats.dtypes import DTYPES, BitArray

pytestmark = pytest.mark.slow

FORMS = {
    "a.weight": Form(DTYPES["F32"], (3, 4)),
    "b.weight": Form(DTYPES["BF16"], (5,)),
    "c.weight": Form(DTYPES["F16"], (2, 2)),
    "d.weight": Form(DTYPES["F64"], (4,)),
    "e.weight": Form(DTYPES["F8_E4M3"], (4,)),
    "empty": Form(DTYPES["F8_E5M2"], (0, 3)),
    "scalar": Form(DTYPES["F32"], ()),
}
# few distinct values, so that sums cancel, and some whose sum depends on the order
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.1, 1e-45, 3e7]) | st.floats(-1e9, 1e9, width=32)
WEIGHTS = st.sampled_from([1.0, -1.0, 0.0, 0.1, 1e-40, -3.0]) | st.floats(-1e3, 1e3)
Deltas = Mapping[str, SparseTensor]


class Counted(DeltaSource):
    """A Source that says which ranges were asked for."""

    def __init__(self, deltas: Deltas) -> None:
        self._deltas = deltas
        self.asked: list[tuple[str, int, int]] = []

    def change(self, name: str, start: int, stop: int, base: BitArray | None = None) -> Change:
        self.asked.append((name, start, stop))
        spec = TensorSpec.like(name, FORMS[name])
        return Change(self._deltas[name].slice_range(start, stop), no_replacements(spec, stop - start))


def vector(name: str, deltas: Deltas, base: Identity = BASE, **header: Any) -> TaskVector:
    specs = [TensorSpec.like(tensor, FORMS[tensor]) for tensor in deltas]
    return TaskVector(Header("vector", base, None, tensors=(), **header), specs, Counted(deltas), name)


@st.composite
def deltas(draw: st.DrawFn) -> Deltas:
    """Some of the tensors, with entries at some of their positions."""
    names = sorted(draw(st.sets(st.sampled_from(sorted(FORMS)))))
    return {name: draw(oracle.sparse_tensors(VALUES, shape=st.just(FORMS[name].shape))) for name in names}


def vectors(count: int) -> st.SearchStrategy[list[TaskVector]]:
    named = [deltas().map(lambda drawn, name=f"{letter}.lota": vector(name, drawn)) for letter in "abcd"[:count]]
    return st.tuples(*named).map(list)


def dense_sum(terms: Sequence[tuple[float, TaskVector]]) -> dict[str, dict[int, float]]:
    """Σ weight · delta in f32, over whole tensors, one vector after the other in the order of their names."""
    found = {}
    for name in sorted({name for _, each in terms for name in each}):
        total = np.zeros(FORMS[name].size, np.float32)
        for weight, each in sorted(terms, key=lambda term: (term[1].name, term[0])):
            if name in each:
                dense = np.zeros_like(total)
                dense[each[name].indices] = each[name].values
                total = total + np.float32(weight) * dense
        found[name] = {int(at): float(total[at]) for at in np.flatnonzero(total)}
    return found


def read(each: TaskVector) -> dict[str, dict[int, float]]:
    return {name: oracle.entries(each[name]) for name in each}


def file_of(each: TaskVector) -> bytes:
    """The bytes of the file it is saved as."""
    with TemporaryDirectory() as folder:
        each.save(Path(folder) / "x.lota")
        return (Path(folder) / "x.lota").read_bytes()


@given(st.integers(2, 4).flatmap(vectors), st.lists(WEIGHTS, min_size=4, max_size=4))
def test_a_weighted_sum_is_the_dense_one(drawn: list[TaskVector], weights: list[float]) -> None:
    terms = list(zip(weights, drawn, strict=False))
    total = weights[0] * drawn[0]
    for weight, each in terms[1:]:
        total = total + each * weight
    assert read(total) == dense_sum(terms)
    for name, found in total.items():
        assert (found.shape, found.values.dtype) == (FORMS[name].shape, np.float32)
        assert len(total.change(name).replacements) == 0
    assert {name: spec.form for name, spec in total.specs.items()} == {name: FORMS[name] for name in total}


@settings(max_examples=50)
@given(vectors(3), st.permutations([0, 1, 2]))
def test_sums_commute_and_associate_to_the_byte(drawn: list[TaskVector], order: list[int]) -> None:
    (a, b, c), (x, y, z) = drawn, [drawn[i] for i in order]
    assert file_of((a + b) + c) == file_of(x + (y + z)) == file_of((y + x) + z)


@settings(max_examples=50)
@given(deltas(), deltas())
def test_so_do_those_of_vectors_of_one_name(first: Deltas, second: Deltas) -> None:
    """Such as files of one name in several folders."""
    a, b = vector("x", first, provenance={"by": "me"}), vector("x", second, provenance={"by": "you"})
    assert file_of(a + b) == file_of(b + a)
    assert file_of(2 * a + 3 * b) == file_of(3 * b + 2 * a)
    assert file_of(2 * a + 3 * a) == file_of(3 * a + 2 * a)


@settings(max_examples=50)
@given(vectors(2))
def test_differences_negate_to_the_byte(drawn: list[TaskVector]) -> None:
    a, b = drawn
    assert file_of(a - b) == file_of(a + -b) == file_of(-b + a) == file_of(-1 * (b - a))


@given(vectors(1))
def test_a_vector_minus_itself_is_empty(drawn: list[TaskVector]) -> None:
    (a,) = drawn
    for nothing in (a - a, a + -a, -a + a, 0 * a, a * -0.0, 3 * a - a - a - a, a / 2 - a * 0.5):
        assert read(nothing) == {name: {} for name in a}


def test_what_is_empty_saves_opens_and_applies(tmp_path: Path) -> None:
    base, tuned = (write_checkpoint(tmp_path / f"{v}", {"w": tensor("BF16", [v, 2, 3])}) for v in (1, 5))
    a = diff(base, tuned)
    (a - a).save(tmp_path / "x.lota")
    opened = TaskVector.open(tmp_path / "x.lota")
    assert read(opened) == {"w": {}}
    apply(opened, base, tmp_path / "out")
    assert ModelFolder(tmp_path / "out").fingerprint == base.fingerprint


@given(vectors(2))
def test_a_twofold_negation_and_powers_of_two_are_exact(drawn: list[TaskVector]) -> None:
    total = drawn[0] + drawn[1]
    assert read(operator.neg(-total)) == read(total)
    assert read((total * 4) / 4) == read(total)
    assert {n: {at: -v for at, v in e.items()} for n, e in read(-total).items()} == read(total)


@pytest.mark.parametrize("factor", [1, 1.0, True, np.float32(1), Fraction(1)])
def test_one_times_a_vector_is_its_own_file(factor: Any, tmp_path: Path) -> None:
    """Replacements, shards, side files and what the file vouches for come along."""
    states = {"base": [1.0, 0.0, 3e38, 4], "tuned": [np.nan, -0.0, -3e38, 5]}
    base, tuned = (
        write_checkpoint(
            tmp_path / name, {"v": tensor("F32", values), "w": tensor("BF16", values)}, shards, {"config.json": b"{}"}
        )
        for shards, (name, values) in enumerate(states.items(), 1)
    )
    diff(base, tuned).save(tmp_path / "a.lota")
    a = TaskVector.open(tmp_path / "a.lota")
    assert len(a.change("v").replacements) == 3
    for same in (factor * a, a * factor, a / factor):
        assert file_of(same) == (tmp_path / "a.lota").read_bytes()
        assert apply(same, base, tmp_path / "out", force=True).exact


def test_replacements_shards_and_side_files_do_not_travel(tmp_path: Path) -> None:
    """They belong to one pair of checkpoints."""
    base = write_checkpoint(tmp_path / "base", {"w": tensor("F32", [0.0, 3])})
    tuned = write_checkpoint(tmp_path / "tuned", {"w": tensor("F32", [-0.0, 4])}, 1, {"config.json": b"{}"})
    total = diff(base, tuned) * 2
    assert read(total) == {"w": {1: 2.0}}
    assert len(total.change("w").replacements) == 0
    assert (total.source.shards(), total.source.files(), total.header.tuned) == (None, None, None)
    total.save(tmp_path / "x.lota")
    assert TaskVector.open(tmp_path / "x.lota").header.files is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtypes", [("F32", "F32"), ("BF16", "BF16"), ("BF16", "F32"), ("F32", "F16")])
def test_weights_that_are_no_numbers_are_not_added_up(value: float, dtypes: tuple[str, str], tmp_path: Path) -> None:
    """A sum without them would have the weights of the base in their place."""
    base = write_checkpoint(tmp_path / "base", {"w": tensor(dtypes[0], [1, 2, 3])})
    tuned = diff(base, write_checkpoint(tmp_path / "tuned", {"w": tensor(dtypes[1], [value, 2, 4])}))
    combined = [merge([tuned], method, base=base) for method in ("linear", "ties", "average")]
    if dtypes != ("F32", "F16"):  # measured from a rounded base, which only a merge beside the base can mend
        combined.append(2 * tuned)
    pruned = merge([tuned], "dare_linear", density=0.5, base=base)
    for vector in [*combined, pruned]:
        with pytest.raises(MergeError, match="tuned: tensor 'w' has changed weights that are NaN or infinite"):
            vector["w"]


def test_the_provenance_names_the_terms() -> None:
    a = vector("a.lota", {}, provenance={"made_by": "train", "name": "mine", "digest": "?"})
    b = vector("b.lota", {})
    total = 2 * b - (a + b) / 2
    assert total.name == "-0.5 * a.lota + -0.5 * b.lota + 2 * b.lota"
    assert total.provenance == {
        "made_by": "arith",
        "parents": [
            {"name": "a.lota", "weight": -0.5, "digest": a.digest},
            {"name": "b.lota", "weight": -0.5, "digest": b.digest},
            {"name": "b.lota", "weight": 2.0, "digest": b.digest},
        ],
        "ancestors": {a.digest: {"made_by": "train", "name": "mine", "digest": "?"}},
    }
    assert (total.base, total.kind, total.header.tuned) == (BASE, "vector", None)


def test_what_any_term_knows_of_a_tensor_the_sum_knows() -> None:
    form = FORMS["b.weight"]
    nothing = SparseTensor.empty(form.shape)
    specs = [TensorSpec.like("b.weight", form, eligible=False), TensorSpec.like("b.weight", form, "ab" * 8)]
    a, b = (
        TaskVector(Header("vector", BASE, None, tensors=()), [spec], Counted({"b.weight": nothing}), name)
        for name, spec in zip("ab", specs, strict=True)
    )
    assert (a + b).specs["b.weight"] == (b + a).specs["b.weight"] == specs[1]


def test_nothing_is_read_before_it_is_asked_for() -> None:
    drawn = {name: SparseTensor.empty(form.shape) for name, form in FORMS.items()}
    a, b = vector("a", drawn), vector("b", {"a.weight": drawn["a.weight"]})
    total = -(a + 2 * b) / 3 - a
    list(total), len(total), total.specs, total.name, total.provenance, total.digest, total.eligible
    assert (a.source.asked, b.source.asked) == ([], [])
    total.change("a.weight", 3, 7)
    assert (a.source.asked, b.source.asked) == ([("a.weight", 3, 7)] * 2, [("a.weight", 3, 7)])
    total["scalar"]
    assert (a.source.asked[2:], b.source.asked[1:]) == ([("scalar", 0, 1)] * 2, [])


def test_entries_that_are_zero_are_dropped() -> None:
    a = vector("a", {"b.weight": sparse((5,), {0: 0, 1: 1, 3: -0.0, 4: 2})})
    b = vector("b", {"b.weight": sparse((5,), {1: -1, 2: 0})})
    assert read(a + b) == {"b.weight": {4: 2.0}}
    assert read(1e-46 * a) == {"b.weight": {}}, "what is too small for f32 is zero"


ONE = {"b.weight": sparse((5,), {0: 1, 3: 0})}


@pytest.mark.parametrize("far", [lambda a: a * 1e39, lambda a: a * -3e38 + a * -3e38, lambda a: a * 1e30 / 1e-30])
def test_what_leaves_the_range_is_refused_by_name(far: Callable[[TaskVector], TaskVector], tmp_path: Path) -> None:
    total = far(vector("a", ONE))
    for refuse in (lambda: total["b.weight"], lambda: total.save(tmp_path / "x.lota")):
        with pytest.raises(MergeError, match=r"^tensor 'b\.weight': a weighted sum leaves the range of f32$"):
            refuse()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda a: a * float("nan"), "the factor of a.lota must be a finite number, found nan"),
        (lambda a: float("-inf") * a, "the factor of a.lota must be a finite number, found -inf"),
        (lambda a: a * 1e300 * 1e300, "the factor of a.lota must be a finite number, found inf"),
        (lambda a: a / 0, "a.lota can only be divided by a finite non-zero number, found 0"),
        (lambda a: a / -0.0, "a.lota can only be divided by a finite non-zero number, found -0.0"),
        (lambda a: a / float("inf"), "a.lota can only be divided by a finite non-zero number, found inf"),
        (lambda a: a / float("nan"), "a.lota can only be divided by a finite non-zero number, found nan"),
        (lambda a: a / 5e-324, "the factor of a.lota must be a finite number, found inf"),
    ],
)
def test_factors_that_cannot_be_meant_are_refused(form: Callable[[TaskVector], object], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        form(vector("a.lota", ONE))


@pytest.mark.parametrize("other", [3, "x", None, [1.0], 1j, np.float32(3)])
@pytest.mark.parametrize("sign", [operator.add, operator.sub])
def test_only_vectors_are_added(sign: Callable[[Any, Any], Any], other: object) -> None:
    a = vector("a", ONE)
    for left, right in ((a, other), (other, a)):
        with pytest.raises(TypeError, match=r"unsupported operand|does not support|can only concatenate"):
            sign(left, right)


@pytest.mark.parametrize("other", ["x", None, 1j, [1.0], np.ones(2), vector("b", ONE)])
def test_only_numbers_are_factors(other: object) -> None:
    a = vector("a", ONE)
    for refuse in (lambda: a * other, lambda: other * a, lambda: a / other, lambda: other / a, lambda: 2 / a):
        with pytest.raises(TypeError, match=r"unsupported operand|can't multiply|does not support"):
            refuse()


@pytest.mark.parametrize("factor", [np.float32(2), np.float64(2), np.int64(2), Fraction(2), 2], ids=repr)
def test_any_real_number_is_a_factor(factor: Any) -> None:
    a = vector("a", ONE)
    for twice in (a * factor, factor * a):
        assert read(twice) == {"b.weight": {0: 2.0}}
    assert read(a / factor) == {"b.weight": {0: 0.5}}


def test_vectors_of_different_bases_are_not_added() -> None:
    a, b = vector("a", ONE), vector("b", ONE, Identity("other", "0" * 64))
    with pytest.raises(BaseMismatchError, match=r"different bases: base \(ba5e.*\) and other \(0000"):
        a - b


def test_tensors_of_different_forms_are_not_added() -> None:
    a, b = vector("a", ONE), vector("b", ONE)
    b.specs["b.weight"] = TensorSpec.like("b.weight", Form(DTYPES["F16"], (5,)))
    with pytest.raises(
        BaseMismatchError, match=r"^tensor 'b.weight' is BF16 \[5\] in one vector and F16 \[5\] in another$"
    ):
        a + b


OPERATIONS = {"negated": operator.neg, "doubled": lambda a: 2 * a, "added": lambda a: a + vector("b", {}, a.base)}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        ({"ids": tensor("I64", [2])}, "tuned: tensor 'ids' is I64: its changes cannot be added"),
        ({"flags": tensor("BOOL", [False])}, "tuned: tensor 'flags' is BOOL: its changes cannot be added"),
        ({"more": tensor("F32", [1])}, "tuned: tensor 'more' is F32 [1] but is not in the base: this change cannot be"),
        ({"w": tensor("F32", [1, 2, 3])}, "tuned: tensor 'w' is F32 [3] but is F32 [2] in the base"),
        ({"w": tensor("BF16", [1, 2])}, "tuned: tensor 'w' is BF16 [2] but is F32 [2] in the base"),
        ({"w": None}, "tuned removes tensor 'w': this change cannot be added"),
        (
            {"w": None, "v": tensor("F32", [1, 2])},
            "tuned removes tensor 'w' and adds 'v': this change cannot be added; if tensors were renamed, save both",
        ),
    ],
    ids=["integers", "booleans", "added", "resized", "retyped", "removed", "renamed"],
)
def test_changes_that_cannot_be_added_are_refused_by_name(
    operation: Callable[[TaskVector], TaskVector], tuned: dict[str, Any], message: str, tmp_path: Path
) -> None:
    before = {"ids": tensor("I64", [1]), "flags": tensor("BOOL", [True]), "w": tensor("F32", [1, 2])}
    after = {name: each for name, each in {**before, **tuned}.items() if each is not None}
    base, other = write_checkpoint(tmp_path / "base", before), write_checkpoint(tmp_path / "tuned", after)
    with pytest.raises(MergeError) as refused:
        operation(diff(base, other))
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_patch_is_not_added(operation: Callable[[TaskVector], TaskVector], tmp_path: Path) -> None:
    base, tuned = (write_checkpoint(tmp_path / f"{v}", {"w": tensor("F32", [v])}) for v in (1, 2))
    with pytest.raises(KindError, match=r"^2 is a patch: it contains new bits, not deltas"):
        operation(diff(base, tuned, kind="patch"))
