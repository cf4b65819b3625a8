"""A → B and then B → C is A → C: to the byte where the base is given, or where no element is summed up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.building import BASE, Tensor, contents, package, sparse, tensor, vector_of, write_checkpoint

from taskvec import Applied, Checkpoint, TaskVector, apply, compose, diff
from taskvec.applying.apply import check_result
from taskvec.applying.overlay import Patched
from taskvec.errors import AlreadyAppliedError, BaseMismatchError, MergeError, UsageError
from taskvec_formats import Form, Header, Identity, ModelFolder, TensorSpec
from taskvec_formats.dtypes import DTYPES, DType
from taskvec_formats.forms import BLOCK_ELEMENTS

pytestmark = pytest.mark.slow

DRAWN = {name: dtype for name, dtype in DTYPES.items() if dtype.additive or name in ("I16", "BOOL")}
SIZE = 6
Tensors = dict[str, Tensor]
# tensors, number of shards, side files
State = tuple[Tensors, int, Mapping[str, bytes]]
both_kinds = pytest.mark.parametrize("kind", ["vector", "patch"])


def chain(folder: Path, states: Sequence[State | Tensors], kinds: Sequence[str] = ("vector", "vector")) -> Any:
    """The folders a, b, c and a stored vector from each to the next."""
    checkpoints = []
    for letter, state in zip("abc", states, strict=False):
        args = state if isinstance(state, tuple) else (state,)
        checkpoints.append(write_checkpoint(folder / letter, *args))
    vectors = []
    for i, kind in enumerate(kinds):
        path = folder / f"{'abc'[i : i + 2]}.lota"
        diff(*checkpoints[i : i + 2], kind=kind).save(path)
        vectors.append(TaskVector.open(path))
    return checkpoints, vectors


def saved(vector: TaskVector, path: Path) -> TaskVector:
    vector.save(path, force=True)
    return TaskVector.open(path)


def leads_to_c(folder: Path, composed: TaskVector, base: Checkpoint) -> None:
    """Unsaved and saved; every file of the folder c must be there, and no other."""
    for number, vector in enumerate((composed, saved(composed, folder / "composed.lota"))):
        out = folder / f"out{number}"
        check_result(vector, base)
        assert apply(vector, base, out, force=True) == Applied(True)
        assert package(out) == package(folder / "c")


@st.composite
def bits(draw: st.DrawFn, count: int) -> list[Tensors]:
    """States of one model, with a tensor of each dtype that can be added and of two others; any bits become any."""
    states: list[Tensors] = [{} for _ in range(count)]
    for name, dtype in DRAWN.items():
        before = draw(oracle.carriers(dtype, SIZE))
        for state in states:
            state[name] = Tensor(dtype, (2, 3), before)
            moved = np.flatnonzero(draw(st.lists(st.booleans(), min_size=SIZE, max_size=SIZE)))
            before = before.copy()
            before[moved] = draw(oracle.carriers(dtype, len(moved)))
    return states


def expected(dtype: DType, states: Sequence[Tensor]) -> tuple[list[int], bool] | None:
    """What a composition without the base gives, and whether no deltas were summed; None for a sum beyond f32."""
    a, b, c = (state.bits for state in states)
    (d1, r1), (d2, r2) = oracle.difference(dtype, a, b), oracle.difference(dtype, b, c)
    result, exact = a.tolist(), True
    for at in range(len(a)):
        deltas = [d[at] for d in (d1, d2) if at in d]
        if at in r2:
            result[at] = r2[at]
        elif at in r1:
            result[at] = oracle.rounded(dtype, oracle.value(dtype, r1[at]) + d2[at]) if at in d2 else r1[at]
        elif deltas:
            with np.errstate(over="ignore"):
                total = float(np.float32(sum(deltas)))
            exact &= len(deltas) == 1
            if not math.isfinite(total):
                return None
            if total:
                result[at] = oracle.rounded(dtype, oracle.value(dtype, result[at]) + total)
    return result, exact


@settings(max_examples=60)
@given(bits(3))
def test_without_the_base_every_bit_is_that_of_the_definition(states: list[Tensors]) -> None:
    wanted = {name: expected(dtype, [state[name] for state in states]) for name, dtype in DRAWN.items()}
    with TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints, (first, second) = chain(folder, states)
        composed = compose(first, second)
        if None in wanted.values():
            with pytest.raises(MergeError, match="the sum of two deltas leaves the range of f32: give the base"):
                apply(composed, checkpoints[0], folder / "out")
            return
        exact = apply(composed, checkpoints[0], folder / "out").exact
        result = ModelFolder(folder / "out")
        found = {name: result.bits(name).tolist() for name in DRAWN}
    assert found == {name: each[0] for name, each in wanted.items()}
    assert exact is (True if all(each[1] for each in wanted.values()) else None)


@settings(max_examples=30)
@given(bits(3), st.tuples(*[st.sampled_from(["vector", "patch"])] * 2))
def test_with_the_base_every_bit_is_that_of_c(states: list[Tensors], kinds: tuple[str, str]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints, (first, second) = chain(folder, states, kinds)
        composed = compose(first, second, checkpoints[0])
        assert composed.kind == ("patch" if kinds == ("patch", "patch") else "vector")
        leads_to_c(folder, composed, checkpoints[0])
        assert composed.header.tuned.fingerprint == checkpoints[2].fingerprint


@settings(max_examples=30)
@given(bits(2), st.data())
def test_without_the_base_too_where_no_element_changes_twice(ends: list[Tensors], data: st.DataObject) -> None:
    a, c = ends
    b = {}
    for name, each in a.items():
        taken = np.array(data.draw(st.lists(st.booleans(), min_size=SIZE, max_size=SIZE)))
        b[name] = each._replace(bits=np.where(taken, c[name].bits, each.bits))
    with TemporaryDirectory() as name:
        checkpoints, (first, second) = chain(Path(name), [a, b, c])
        composed = compose(first, second)
        leads_to_c(Path(name), composed, checkpoints[0])
        # what is touched by one of them, it vouches for: elsewhere the base may be another
        for tensor_name, spec in composed.specs.items():
            alone = (tensor_name in first) != (tensor_name in second)
            assert alone is bool(spec.blocks)


RNG = np.random.default_rng(0)


def noise(*shape: int) -> Any:
    return RNG.normal(size=shape)


def moved(each: Tensor, start: int) -> Tensor:
    """Every fourth element, from the given one on, some bit patterns further."""
    bits = each.bits.copy()
    bits[start::4] += 3
    return each._replace(bits=bits)


MODEL = {"embed": tensor("F32", noise(6, 3)), "ids": tensor("I64", np.arange(9)), "w": tensor("BF16", noise(5, 4))}
FIRST = {name: moved(each, 0) for name, each in MODEL.items()}
LAST = {name: moved(each, 1) for name, each in FIRST.items()}
FILES = {"config.json": b"{}", "vocab.txt": b"a b"}
OTHER = {"config.json": b'{"a": 1}', "vocab.txt": b"a b"}
NOTHING = tensor("F32", noise(0, 2))
LARGER, NARROWER = tensor("F32", noise(8, 3)), tensor("BF16", MODEL["embed"].bits.view("<f4").reshape(6, 3))

# with and without the base
CHAINS: dict[str, Sequence[State | Tensors]] = {
    "one shard": [MODEL, FIRST, LAST],
    "nothing at first": [MODEL, MODEL, LAST],
    "nothing at last": [MODEL, FIRST, FIRST],
    "nothing": [MODEL, MODEL, MODEL],
    "several shards": [(MODEL, 2, FILES), (FIRST, 2, FILES), (LAST, 2, FILES)],
    "split at first": [(MODEL, 1, FILES), (FIRST, 3, FILES), (LAST, 3, FILES)],
    "split at last": [(MODEL, 1, FILES), (FIRST, 1, FILES), (LAST, 3, FILES)],
    "split and joined": [(MODEL, 1, FILES), (FIRST, 3, FILES), (LAST, 1, FILES)],
    "split twice": [(MODEL, 1, FILES), (FIRST, 2, FILES), (LAST, 3, FILES)],
    "files change at first": [(MODEL, 1, FILES), (FIRST, 1, OTHER), (LAST, 1, OTHER)],
    "files change at last": [(MODEL, 1, FILES), (FIRST, 1, FILES), (LAST, 1, OTHER)],
    "files change back": [(MODEL, 1, FILES), (FIRST, 1, OTHER), (LAST, 1, FILES)],
    "files come": [(MODEL, 1, {}), (FIRST, 1, {"config.json": b"1"}), (LAST, 1, {**OTHER, "config.json": b"1"})],
    "files go": [(MODEL, 1, FILES), (FIRST, 1, FILES), (LAST, 1, {})],
    "files come and go": [(MODEL, 1, {}), (FIRST, 1, FILES), (LAST, 1, {})],
    "files alone": [(MODEL, 1, FILES), (MODEL, 1, OTHER), (MODEL, 2, FILES)],
    "resized at first": [MODEL, {**FIRST, "embed": LARGER}, {**LAST, "embed": LARGER}],
    "resized at last": [MODEL, {**FIRST, "embed": MODEL["embed"]}, {**LAST, "embed": LARGER}],
    "retyped at first": [MODEL, {**FIRST, "embed": NARROWER}, {**LAST, "embed": moved(NARROWER, 2)}],
    "retyped at last": [MODEL, {**FIRST, "embed": MODEL["embed"]}, {**LAST, "embed": moved(NARROWER, 2)}],
    "added at first": [MODEL, {**FIRST, "more": tensor("F32", [0, 1, 0])}, {**LAST, "more": tensor("F32", [2, 1, 0])}],
    "added at last": [MODEL, FIRST, {**LAST, "more": tensor("BF16", noise(3))}],
    "added and removed": [MODEL, {**FIRST, "more": LARGER}, LAST],
    "removed at first": [MODEL, {n: t for n, t in FIRST.items() if n != "w"}, {n: LAST[n] for n in ("embed", "ids")}],
    "removed at last": [MODEL, FIRST, {n: LAST[n] for n in ("embed", "ids")}],
    "both removed": [MODEL, {n: FIRST[n] for n in ("embed", "ids")}, {"ids": LAST["ids"]}],
    "renamed": [MODEL, {**FIRST, "tokens": FIRST["w"]}, {("v" if n == "w" else n): t for n, t in LAST.items()}],
    "an empty one comes": [MODEL, {**FIRST, "none": NOTHING}, {**LAST, "none": NOTHING}],
    "a scalar": [{"s": tensor("F32", 1.5)}, {"s": tensor("F32", np.nan)}, {"s": tensor("F32", 2.5)}],
}
# these need the base
LONG: dict[str, Sequence[Tensors]] = {
    "resized after a change": [MODEL, FIRST, {**LAST, "embed": LARGER}],
    "resized twice": [MODEL, {**FIRST, "embed": LARGER}, {**LAST, "embed": tensor("F32", noise(7, 4))}],
    "retyped after a change": [MODEL, FIRST, {**LAST, "embed": NARROWER}],
    "removed and added": [MODEL, {n: FIRST[n] for n in ("embed", "ids")}, {**LAST, "w": tensor("F32", noise(2))}],
    "removed and added again": [MODEL, {n: FIRST[n] for n in ("embed", "ids")}, {**LAST, "w": MODEL["w"]}],
}


@pytest.mark.parametrize("states", CHAINS.values(), ids=CHAINS)
def test_a_folder_comes_out_byte_for_byte(states: Sequence[State | Tensors], tmp_path: Path) -> None:
    (base, *_, last), (first, second) = chain(tmp_path, states)
    composed = compose(first, second)
    leads_to_c(tmp_path, composed, base)
    assert (composed.base, composed.header.tuned) == (first.base, second.header.tuned)
    assert composed.header.tuned.fingerprint == last.fingerprint


@pytest.mark.parametrize("kinds", list(product(["vector", "patch"], repeat=2)), ids="-".join)
@pytest.mark.parametrize("states", [*CHAINS.values(), *LONG.values()], ids=[*CHAINS, *LONG])
def test_so_it_does_with_the_base(states: Sequence[State | Tensors], kinds: tuple[str, str], tmp_path: Path) -> None:
    (base, *_), (first, second) = chain(tmp_path, states, kinds)
    leads_to_c(tmp_path, compose(first, second, base), base)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ("resized after a change", r"tensor 'embed' is changed by ab.lota and then made F32 \[8, 3\] by bc.lota"),
        ("resized twice", r"tensor 'embed' is changed by ab.lota and then made F32 \[7, 4\] by bc.lota"),
        ("retyped after a change", r"tensor 'embed' is changed by ab.lota and then made BF16 \[6, 3\] by bc.lota"),
        ("removed and added", "tensor 'w' is removed by ab.lota and added by bc.lota"),
    ],
)
def test_what_needs_the_base_says_so(states: str, message: str, tmp_path: Path) -> None:
    _, (first, second) = chain(tmp_path, LONG[states])
    with pytest.raises(UsageError, match=rf"^{message}: give the base \(`base`\)$"):
        compose(first, second)


def test_a_patch_needs_the_base(tmp_path: Path) -> None:
    for kinds, named in ((("patch", "vector"), "ab.lota"), (("vector", "patch"), "bc.lota")):
        (tmp_path / named).mkdir()
        _, (first, second) = chain(tmp_path / named, [MODEL, FIRST, LAST], kinds)
        with pytest.raises(
            UsageError, match=f"^{named} is a patch, which can only be read with its base: give the base"
        ):
            compose(first, second)


@both_kinds
def test_vectors_that_do_not_follow_one_another_are_refused(kind: str, tmp_path: Path) -> None:
    states = [MODEL, FIRST, {name: moved(each, 0) for name, each in FIRST.items()}]
    (base, *others), (first, second) = chain(tmp_path, states, (kind, kind))
    with pytest.raises(
        AlreadyAppliedError, match=r"^ab.lota is applied to b already: tensor 'embed' has the tuned values$"
    ):
        compose(first, second, others[0])
    other = "tensor 'embed' has other values where the vector changes it"
    with pytest.raises(BaseMismatchError, match=rf"^c is not the base of ab.lota \(a\): {other}$"):
        compose(first, second, others[1])
    with pytest.raises(BaseMismatchError, match=rf"^a is not the base of bc.lota \(b\): {other}$"):
        compose(second, first, base)
    with pytest.raises(AlreadyAppliedError, match=r"^ab.lota is applied to a \+ ab.lota already"):
        compose(first, first, base)
    if kind == "vector":
        start, end = (identity.fingerprint[:12] for identity in (first.base, second.header.tuned))
        with pytest.raises(
            BaseMismatchError, match=rf"^ab.lota starts from a \({start}\), but bc.lota leads to c \({end}\)$"
        ):
            compose(second, first)


def test_where_b_is_not_known_the_base_is_needed(tmp_path: Path) -> None:
    """After a sparsification, a sum, a training."""
    base, tuned = (write_checkpoint(tmp_path / n, {"w": t}) for n, t in (("a", MODEL["w"]), ("t", FIRST["w"])))
    sparse_one = saved(diff(base, tuned, 0.9), tmp_path / "sparse.lota")
    apply(sparse_one, base, tmp_path / "b")
    second = diff(ModelFolder(tmp_path / "b"), write_checkpoint(tmp_path / "c", {"w": LAST["w"]}))
    for first in (sparse_one, sparse_one + 0 * sparse_one):
        with pytest.raises(UsageError, match="does not record the checkpoint that it leads to, so c may"):
            compose(first, second)
        leads_to_c(tmp_path, compose(first, second, base), base)


def test_it_may_start_from_any_checkpoint_that_both_fit(tmp_path: Path) -> None:
    """As `apply` may: on a base that was tuned elsewhere, by another vector."""
    (base, *_), (first, second) = chain(tmp_path, [MODEL, FIRST, LAST])
    other = write_checkpoint(tmp_path / "other", {name: moved(each, 2) for name, each in MODEL.items()})
    apply(first, other, tmp_path / "one")
    apply(second, ModelFolder(tmp_path / "one"), tmp_path / "two")
    composed = compose(first, second, other)
    assert apply(composed, other, tmp_path / "out").exact
    assert contents(ModelFolder(tmp_path / "out")) == contents(ModelFolder(tmp_path / "two"))
    assert composed.base.fingerprint == other.fingerprint != base.fingerprint


def test_three_in_a_row(tmp_path: Path) -> None:
    states = [MODEL, FIRST, LAST]
    (base, *_), (first, second) = chain(tmp_path, states)
    end = write_checkpoint(tmp_path / "d", {name: moved(each, 2) for name, each in LAST.items()}, 2)
    third = saved(diff(ModelFolder(tmp_path / "c"), end), tmp_path / "cd.lota")
    for number, at_hand in enumerate((None, base)):
        left = compose(compose(first, second, at_hand), third, at_hand)
        right = compose(first, compose(second, third), at_hand)
        for side, composed in enumerate((left, right)):
            out = tmp_path / f"{number}{side}"
            assert apply(saved(composed, tmp_path / f"{out.name}.lota"), base, out).exact
            assert package(out) == package(tmp_path / "d")


def test_deltas_add_up_and_replacements_stay_beside_them(tmp_path: Path) -> None:
    values = {"a": [1.0, 2, 3, 4, 5], "b": [1.5, 2, 7, np.nan, 5], "c": [1.5, 4, 3, 4, np.inf]}
    _, (first, second) = chain(tmp_path, [{"w": tensor("F32", each)} for each in values.values()])
    composed = compose(first, second)
    assert oracle.entries(composed["w"]) == {0: 0.5, 1: 2.0}, "what cancels is dropped"
    assert oracle.entries(composed.change("w").replacements) == {3: 0x40800000, 4: 0x7F800000}
    assert composed.header.tuned is None
    assert composed.change("w", 1, 3).delta.indices.tolist() == [0]


def test_a_composition_is_a_term_like_any_vector(tmp_path: Path) -> None:
    values = {"a": [1.0, 2, 3], "b": [1.5, 2, 7], "c": [1.5, 4, 3]}
    _, (first, second) = chain(tmp_path, [{"w": tensor("F32", each)} for each in values.values()])
    assert oracle.entries((2 * compose(first, second))["w"]) == {0: 1.0, 1: 4.0}


def known(delta: Mapping[int, float], name: str, **ends: Identity) -> TaskVector:
    """A vector of one tensor w, F32 [4], that knows where it leads."""
    each = vector_of({"w": sparse((4,), delta)}, name=name)
    header = Header("vector", ends.get("base", BASE), ends.get("tuned", BASE), tensors=())
    return TaskVector(header, each.specs.values(), each.source, name)


def test_what_only_one_holds_is_kept_as_it_is() -> None:
    """A zero is an entry like any other, and its sign decides over that of a zero weight."""
    first, second = known({0: 0.0, 2: -0.0, 3: 1.5}, "first"), known({1: -0.0, 3: -1.5}, "second")
    composed = compose(first, second)["w"]
    assert oracle.exact(composed) == oracle.exact(sparse((4,), {0: 0.0, 1: -0.0, 2: -0.0}))


def test_the_result_knows_c_only_where_it_is_exact_for_certain() -> None:
    end = Identity("end", "e" * 64)
    first = known({0: 1, 1: 2}, "first")
    for second, tuned in (
        (known({2: 1}, "second", tuned=end), end),
        (known({1: 1, 2: 1}, "second", tuned=end), None),
        (vector_of({"w": sparse((4,), {2: 1})}), None),
        (TaskVector(Header("vector", BASE, end, tensors=()), [], first.source), end),
    ):
        assert compose(first, second).header.tuned == tuned


def test_a_sum_of_deltas_beyond_f32_needs_the_base(tmp_path: Path) -> None:
    (base, *_), (first, second) = chain(tmp_path, [{"w": tensor("F32", [1, each])} for each in (-3e38, 0.0, 3e38)])
    with pytest.raises(MergeError, match=r"^tensor 'w': the sum of two deltas leaves the range of f32: give the base"):
        compose(first, second).save(tmp_path / "x.lota")
    leads_to_c(tmp_path, compose(first, second, base), base)


def test_unless_the_bits_are_known_anyway(tmp_path: Path) -> None:
    """f32 deltas are not exact in f64."""
    (base, *_), (first, second) = chain(tmp_path, [{"w": tensor("F64", [1, each])} for each in (-3e38, 1.0, 3e38)])
    composed = compose(first, second)
    assert len(composed["w"]) == 0
    leads_to_c(tmp_path, composed, base)


def test_files_that_contradict_one_another_are_refused() -> None:
    first, second = known({0: 1}, "first"), known({1: 1}, "second")
    second.specs["w"] = TensorSpec.like("w", Form(DTYPES["F32"], (2, 2)))
    with pytest.raises(BaseMismatchError, match=r"^tensor 'w' should be F32 \[2, 2\] in the base of second, but it is"):
        compose(first, second)


def test_side_files_of_another_b_are_not_taken_for_those_that_second_means(tmp_path: Path) -> None:
    """The weights of B agree, a side file does not: the result is not called exact."""
    (base, *_), (first, _) = chain(tmp_path, [(MODEL, 1, FILES), (FIRST, 1, OTHER), (LAST, 1, OTHER)])
    other = write_checkpoint(tmp_path / "other", FIRST, 1, {**OTHER, "config.json": b"mine"})
    last = write_checkpoint(tmp_path / "last", LAST, 1, {**OTHER, "config.json": b"mine"})
    composed = compose(first, diff(other, last))
    assert apply(composed, base, tmp_path / "out") == Applied(False, ("config.json differs from the vector's base",))


def test_the_provenance_names_both(tmp_path: Path) -> None:
    (base, *_), (first, second) = chain(tmp_path, [MODEL, FIRST, LAST])
    parents = [{"name": v.name, "digest": v.digest} for v in (first, second)]
    ancestors = {v.digest: v.provenance for v in (first, second)}
    for composed in (compose(first, second), compose(first, second, base)):
        assert composed.provenance == {"made_by": "compose", "parents": parents, "ancestors": ancestors}
        assert composed.name == "ab.lota >> bc.lota"


@pytest.mark.parametrize("kinds", [("vector", "vector"), ("patch", "patch")], ids=["vector", "patch"])
def test_tensors_of_several_blocks_are_computed_a_block_or_a_tensor_at_a_time(
    kinds: tuple[str, str], tmp_path: Path
) -> None:
    size = 2 * BLOCK_ELEMENTS + 40
    states = [np.full(size, 0x3F80, np.uint16) for _ in range(3)]
    rng = np.random.default_rng(2)
    for number, after in enumerate(states[1:]):
        after[:] = states[number]
        after[rng.integers(size, size=5000)] += 1
    (base, *_), (first, second) = chain(
        tmp_path, [{"w": Tensor(DTYPES["BF16"], (size,), each)} for each in states], kinds
    )
    leads_to_c(tmp_path, compose(first, second, base), base)
    if kinds == ("vector", "vector"):
        composed, span = compose(first, second), (BLOCK_ELEMENTS - 9, BLOCK_ELEMENTS + 9000)
        whole = composed["w"].slice_range(*span) if composed["w"].shape == (size,) else None
        assert oracle.exact(composed.change("w", *span).delta) == oracle.exact(whole)
        assert len(whole) > 0


def test_a_checkpoint_with_a_vector_on_it_is_the_folder_that_apply_writes(tmp_path: Path) -> None:
    for name, states in {**CHAINS, **LONG}.items():
        folder = tmp_path / name
        folder.mkdir()
        checkpoints, vectors = chain(folder, states)
        for before, vector, after in zip(checkpoints, vectors, checkpoints[1:], strict=False):
            patched = Patched(before, vector)
            assert contents(patched) == contents(after)
            assert patched.fingerprint == after.fingerprint
