"""What a vector is made of is recorded once an ancestor, within a bound, and what no file can hold is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import oracle
from support.building import BASE, sparse, tensor, vector_of, write_checkpoint

from taskvec import TaskVector, compose, diff, merge
from taskvec.errors import UsageError
from taskvec.vectors.lineage import ANCESTORS, BYTES, NAME
from taskvec.vectors.vector import DEPTH
from taskvec_formats import Header, LotaWriter

pytestmark = pytest.mark.slow

ONE = {"w": sparse((4,), {0: 1})}
OTHER = {"w": sparse((4,), {0: 1, 2: 3})}
Make = Callable[[TaskVector, TaskVector], TaskVector]
MAKE: dict[str, Make] = {
    "merge": lambda a, b: merge([a, b], "linear", [0.5, 1]),
    "arith": lambda a, b: a - 2 * b,
    "arith, distinct": lambda a, b: 0.5 * a + b,
}


def trained(name: str, deltas: Any = None, **facts: Any) -> TaskVector:
    vector = vector_of(deltas or ONE, name=name)
    vector.header.provenance.update(made_by="train", seed=name, **facts)
    return vector


def stored(vector: TaskVector, path: Path) -> TaskVector:
    vector.save(path)
    opened = TaskVector.open(path)
    assert opened.provenance == json.loads(json.dumps(vector.provenance))
    return opened


def size(vector: TaskVector) -> int:
    return len(json.dumps(vector.provenance, separators=(",", ":")))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_generations_of_two_parents_do_not_double_the_record(make: Make, tmp_path: Path) -> None:
    a, b = trained("a.lota"), trained("b.lota", OTHER, options=list(range(300)))
    sizes = []
    for number in range(25):
        a, b = (
            stored(made, tmp_path / f"{name}{number}.lota") for name, made in (("a", make(a, b)), ("b", make(b, a)))
        )
        sizes.append(size(a))
        digests = {parent["digest"] for parent in a.provenance["parents"]}
        assert digests <= a.provenance["ancestors"].keys()
    assert max(sizes) < 2 * BYTES
    known = a.provenance["ancestors"].values()
    assert [each for each in known if each.get("seed") == "b.lota"] == [b_facts(b)]


def b_facts(descendant: TaskVector) -> dict[str, Any]:
    return {"made_by": "train", "seed": "b.lota", "options": list(range(300))}


def test_the_nearest_ancestors_are_kept_and_the_others_are_counted(tmp_path: Path) -> None:
    vector = trained("0")
    for number in range(1, 3 * ANCESTORS):
        parent, vector = vector, stored(merge([vector], "linear"), tmp_path / f"{number}.lota")
        ancestors = vector.provenance["ancestors"]
        assert ancestors[parent.digest]["made_by"] == ("merge" if number > 1 else "train")
        assert len(ancestors) == min(number, ANCESTORS)
        assert vector.provenance.get("ancestors_left_out", 0) == max(0, number - ANCESTORS)


def test_a_parent_too_large_to_be_recorded_is_counted() -> None:
    large, small = trained("large", losses=[0.5] * BYTES), trained("small", OTHER)
    made = merge([large, small], "linear")
    assert list(made.provenance["ancestors"].values()) == [{"made_by": "train", "seed": "small"}]
    assert made.provenance["ancestors_left_out"] == 1
    assert [parent["name"] for parent in made.provenance["parents"]] == ["large", "small"]


def test_vectors_of_one_content_that_came_about_differently_are_both_recorded(tmp_path: Path) -> None:
    """A merge of one vector has its content, and so its digest."""
    first = stored(trained("a"), tmp_path / "a.lota")
    copy = stored(merge([first], "linear"), tmp_path / "b.lota")
    assert copy.digest == first.digest
    for generation in range(2):
        copy = stored(merge([copy, first], "linear", [1, 0]), tmp_path / f"c{generation}.lota")
        facts = copy.provenance["ancestors"]
        assert {key.partition(":")[0] for key in facts} == {first.digest}
        assert sum(each["made_by"] == "train" for each in facts.values()) == 1
    assert len(facts) == 3


def test_a_hostile_table_of_ancestors_costs_little(tmp_path: Path) -> None:
    vector = trained("a")
    table = {f"{'d' * 16}:{number}": {"n": number} for number in range(60_000)}
    parents = [{"name": "x", "digest": "d" * 16}]
    vector.header.provenance.update(parents=parents, ancestors=table, ancestors_left_out=-5)
    made = stored(merge([vector], "linear"), tmp_path / "x.lota")
    assert len(made.provenance["ancestors"]) == ANCESTORS
    assert made.provenance["ancestors_left_out"] == 60_001 - ANCESTORS


def test_names_of_merges_of_merges_stay_short() -> None:
    vector = trained("x" * 500)
    for _ in range(6):
        vector = merge([vector, vector + trained("y")], "linear")
        assert len(vector.name) <= NAME
        assert all(len(parent["name"]) <= NAME for parent in vector.provenance["parents"])


def test_a_name_that_is_not_text_is_recorded_as_text() -> None:
    assert merge([vector_of(ONE, name="a\udcff.lota")], "linear").provenance["parents"][0]["name"] == "a\\udcff.lota"


def nested(generations: int) -> dict[str, Any]:
    """The provenance of a merge as it was recorded before: that of each parent stands inside."""
    made: dict[str, Any] = {"made_by": "train", "seed": 7}
    for number in range(generations):
        made = {"made_by": "merge", "parents": [{**made, "name": f"{number}.lota", "digest": f"{number:016}"}]}
    return made


@pytest.mark.parametrize("generations", [3, 150])
def test_files_that_record_their_parents_inside_are_read_and_recorded_flat(generations: int, tmp_path: Path) -> None:
    vector = vector_of(ONE)
    vector.header.provenance.update(nested(generations))
    old = stored(vector, tmp_path / "old.lota")
    assert old.provenance == nested(generations)
    made = stored(merge([old], "linear"), tmp_path / "new.lota")
    ancestors = made.provenance["ancestors"]
    last = f"{generations - 1:016}"
    assert ancestors[old.digest] == {
        "made_by": "merge",
        "parents": [{"name": f"{generations - 1}.lota", "digest": last}],
    }
    assert len(ancestors) == min(generations + 1, ANCESTORS)
    assert made.provenance.get("ancestors_left_out", 0) == generations + 1 - len(ancestors)
    if generations == 3:
        assert ancestors[f"{0:016}"] == {"made_by": "train", "seed": 7}


@pytest.mark.parametrize(
    "provenance",
    [
        {"parents": 3, "ancestors": "x", "ancestors_left_out": "many"},
        {"parents": [None, "a", {"digest": 5}, {"name": 1}], "ancestors": {"a": 5, "b": None}},
        {"parents": [{"digest": "d", "name": ["x"], "parents": {"a": 1}}], "ancestors": []},
    ],
)
def test_any_object_may_be_the_provenance_of_a_parent(provenance: dict[str, Any], tmp_path: Path) -> None:
    vector = vector_of(ONE)
    vector.header.provenance.update(provenance)
    for how, make in MAKE.items():
        made = stored(make(vector, trained("b", OTHER)), tmp_path / f"{how}.lota")
        assert vector.digest in made.provenance["ancestors"]


def test_vectors_that_were_made_differently_have_different_digests(tmp_path: Path) -> None:
    base, *states = (write_checkpoint(tmp_path / f"{v}", {"w": tensor("F32", [v, 2])}) for v in (1, 5, 6))
    a, b = (diff(base, state) for state in states)
    assert a.digest != b.digest
    assert (a + b).digest != (a - b).digest != merge([a, b]).digest
    a.save(tmp_path / "a.lota")
    opened = TaskVector.open(tmp_path / "a.lota")
    before = opened.digest
    opened.header.provenance["note"] = "of no account where the blocks are known"
    assert opened.digest == before


# chains

CHAINS: dict[str, Make] = {
    "linear": lambda a, b: merge([a, b], "linear"),
    "pruned sums": lambda a, b: merge([a + b, b], "breadcrumbs", density=0.5),
    "ties": lambda a, b: merge([a * 2, b], "ties", density=0.5, lam=0.5),
}


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
def test_merges_of_merges_are_computed_up_to_a_depth_and_refused_beyond(make: Make, tmp_path: Path) -> None:
    vector, other = trained("a", OTHER), trained("b")
    for _ in range(DEPTH // (2 if make is CHAINS["pruned sums"] or make is CHAINS["ties"] else 1)):
        vector = make(vector, other)
    assert vector.depth == DEPTH
    vector["w"]
    vector.save(tmp_path / "x.lota")
    with pytest.raises(
        UsageError, match=rf"at most {DEPTH} are possible: save one of the intermediate vectors and open it$"
    ):
        make(vector, other)
    assert make(TaskVector.open(tmp_path / "x.lota"), other).depth <= 2


def test_a_sum_of_any_number_of_vectors_is_one_step(tmp_path: Path) -> None:
    total, other = vector_of(OTHER, name="v"), vector_of(ONE, name="w")
    for _ in range(2000):
        total = total + other
    assert total.depth == 1
    total.save(tmp_path / "x.lota")
    opened = TaskVector.open(tmp_path / "x.lota")
    assert oracle.entries(opened["w"]) == {0: 2001.0, 2: 3.0}
    assert len(opened.provenance["parents"]) == 2001
    assert len(total.name) <= NAME


def test_a_chain_of_compositions_is_refused_beyond_the_depth(tmp_path: Path) -> None:
    states = [write_checkpoint(tmp_path / f"{i}", {"w": tensor("F32", [1, i, 3])}) for i in range(2)]
    there, back = diff(*states), diff(*reversed(states))
    for base in (None, states[0]):
        vector = there
        for number in range(DEPTH):
            vector = compose(vector, there if number % 2 else back, base)
        with pytest.raises(UsageError, match="computed through a chain of 101 vectors"):
            compose(vector, back, base)


def test_sum_adds_vectors() -> None:
    a, b = vector_of(ONE, name="a"), vector_of(OTHER, name="b")
    assert sum([a, b, b]).provenance == (a + b + b).provenance  # type: ignore[arg-type, union-attr]
    assert sum([a]) is a  # type: ignore[arg-type]
    for wrong in (1, 0.0, "", None, False):
        with pytest.raises(TypeError):
            wrong + a  # type: ignore[operator]


# what a file cannot hold


class Thing:
    def __repr__(self) -> str:
        return "<thing>"


def deep(levels: int) -> Any:
    made: Any = 1
    for _ in range(levels):
        made = [made]
    return made


def circular() -> Any:
    made: list[Any] = []
    made.append(made)
    return made


def bomb() -> Any:
    made: Any = ["x"]
    for _ in range(30):
        made = [made] * 10
    return made


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Thing(), "contains <thing>: expected a JSON value"),
        ({1, 2}, r"contains \{1, 2\}: expected a JSON value"),
        (b"x", "contains b'x': expected a JSON value"),
        (1j, "contains 1j: expected a JSON value"),
        (float("nan"), "contains nan, which JSON cannot represent"),
        ([float("-inf")], "contains -inf, which JSON cannot represent"),
        ({"a": [{3: 4}]}, "has the key 3: expected a string"),
        ({None: 1}, "has the key None: expected a string"),
        ({True: 1, "b": 2}, "has the key True: expected a string"),
        ("a\ud800", r"contains 'a\\ud800', which is not valid Unicode text"),
        ({"\udcff": 1}, r"contains '\\udcff', which is not valid Unicode text"),
        (10**5000, "contains a number of about 5000 digits, which is too large for JSON"),
        (deep(2000), "is nested more than 400 levels deep"),
        (deep(100_000), "is nested more than 400 levels deep"),
        (circular(), "is nested more than 400 levels deep, or contains itself"),
        (bomb(), "is too large to be stored"),
        ("x" * (1 << 22), r"takes 4,194,3\d\d bytes, at most 4,177,920 can be stored"),
    ],
    ids=lambda value: repr(value)[:20] if isinstance(value, str) else type(value).__name__,
)
def test_a_provenance_that_no_file_can_hold_is_refused_before_anything_is_written(
    value: Any, message: str, tmp_path: Path
) -> None:
    vector = trained("mine.lota", note=value)
    for refuse in (
        lambda: vector.save(tmp_path / "x.lota"),
        lambda: merge([vector], "linear").save(tmp_path / "x.lota"),
        lambda: (vector * 2).save(tmp_path / "x.lota"),
        lambda: vector.digest,
    ):
        with pytest.raises(UsageError, match=f"^the provenance of mine.lota {message}"):
            refuse()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value", [None, True, 1.5, -(2**63), 2**1000, "ä\U0001f9ea\0", [], {}, (1, 2), deep(390), "x" * 4_000_000]
)
def test_what_json_holds_is_stored_as_it_is(value: Any, tmp_path: Path) -> None:
    stored(trained("mine.lota", note=value), tmp_path / "x.lota")


def test_the_record_is_the_same_from_any_thread() -> None:
    a, b = trained("a"), trained("b", OTHER)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(json.dumps((a + b).provenance))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {json.dumps((a + b).provenance)}


def test_stored_vectors_of_one_content_are_equal(tmp_path: Path) -> None:
    for name, vector in {"a": trained("a"), "b": trained("b"), "c": trained("c", OTHER)}.items():
        vector.save(tmp_path / f"{name}.lota")
    a, b, c = (TaskVector.open(tmp_path / f"{name}.lota") for name in "abc")
    assert a == TaskVector.open(tmp_path / "a.lota") == b
    assert len({a, b, c}) == 2
    assert a != c
    assert a not in (None, 3, {}, "a.lota", 2 * a)
    lazy = a + c
    assert lazy == lazy  # noqa: PLR0124
    assert lazy != a + c


def test_two_that_differ_in_what_they_remove_are_not_equal(tmp_path: Path) -> None:
    for name, removed in (("a", ()), ("b", ("x",))):
        with LotaWriter(tmp_path / name, Header("vector", BASE, None, tensors=(), removed=removed)):
            pass
    a, b = (TaskVector.open(tmp_path / name) for name in "ab")
    assert a.digest == b.digest
    assert a != b


def test_the_names_of_a_patch_can_be_asked_for(tmp_path: Path) -> None:
    base, tuned = (
        write_checkpoint(tmp_path / f"{v}", {"w": tensor("F32", [v]), "x": tensor("F32", [3])}) for v in (1, 2)
    )
    patch = diff(base, tuned, kind="patch")
    patch.save(tmp_path / "p.lota")
    for each in (patch, TaskVector.open(tmp_path / "p.lota")):
        assert ("w" in each, "x" in each, 3 in each) == (True, False, False)
        assert (list(each), len(each), "w" in each.keys()) == (["w"], 1, True)  # noqa: SIM118
        assert each == each  # noqa: PLR0124
        assert bool(each)
    assert TaskVector.open(tmp_path / "p.lota") == TaskVector.open(tmp_path / "p.lota")
