"""Merge methods of other authors: their registration, their options and what their functions may return."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import numpy as np
import pytest
import torch
from support import oracle
from support.building import sparse, vector_of
from support.commands import ok, refused
from support.paths import ROOT
from support.recipes import merged

from taskvec import TaskVector, merge
from taskvec.errors import MergeError, UsageError
from taskvec.merging import METHODS, Bounds, merge_method
from taskvec.merging.combine import merge as library_merge
from taskvec.merging.methods.options import options_of
from taskvec.merging.registry import BUILT_IN, RESERVED
from taskvec_formats import SparseTensor

if TYPE_CHECKING:
    from nowhere import Missing  # type: ignore[import-not-found]

Share = Annotated[float, Bounds(0, 1)]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Methods that a test registers are forgotten afterwards."""
    known = set(METHODS)
    yield
    for name in METHODS.keys() - known:
        del METHODS[name]


def vectors() -> list[TaskVector]:
    return [vector_of({"w": sparse((4,), {0: 1, 2: 3})}), vector_of({"w": sparse((4,), {2: 5})})]


def optional(
    vectors: Missing,
    *,
    keep: int | None = None,
    share: Optional[float] = 0.5,  # noqa: UP045
    flag: bool | None = None,
    text: str | None = None,
    bounded: Annotated[float, Bounds(0, 1)] | None = None,
    within: Annotated[float | None, Bounds(0, 1)] = 0.5,
    named: Optional[Share] = None,  # noqa: UP045
    implied: int = None,  # type: ignore[assignment]  # noqa: RUF013
    mode: Literal["a", "b"] | None = None,
    plain: int = 1,
    either: int | str = 1,
) -> Any: ...


@pytest.mark.parametrize("name", ["keep", "share", "flag", "text", "bounded", "within", "named", "implied", "mode"])
def test_an_optional_option_accepts_none(name: str) -> None:
    option = options_of(optional)[name]
    assert option.read(None) is None
    assert option.parse("none") is None
    assert option.parse("None") is None


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("keep", np.int8(5), 5),
        ("share", np.float32(0.25), 0.25),
        ("flag", np.True_, True),
        ("text", "x", "x"),
        ("bounded", 1, 1.0),
        ("within", 0, 0.0),
        ("named", 0.5, 0.5),
        ("implied", 3, 3),
        ("mode", "a", "a"),
        ("either", [1], [1]),
    ],
)
def test_an_optional_option_reads_values_as_the_plain_type(name: str, value: Any, read: Any) -> None:
    found = options_of(optional)[name].read(value)
    assert found == read
    assert type(found) is type(read)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("keep", "5", "`keep` must be a whole number, or None, found '5'"),
        ("keep", 1.5, "`keep` must be a whole number, or None, found 1.5"),
        ("keep", True, "`keep` must be a whole number, or None, found True"),
        ("share", "x", "`share` must be a number, or None, found 'x'"),
        ("share", float("nan"), "`share` must be finite, or None, found nan"),
        ("flag", 1, "`flag` must be True or False, or None, found 1"),
        ("text", 1, "`text` must be a string, or None, found 1"),
        ("bounded", 2, "`bounded` must be at least 0 and at most 1, or None, found 2"),
        ("within", -1, "`within` must be at least 0 and at most 1, or None, found -1"),
        ("named", 2, "`named` must be at least 0 and at most 1, or None, found 2"),
        ("mode", "c", "`mode` is one of a, b, found 'c'"),
        ("plain", None, "`plain` must be a whole number, found None"),
    ],
)
def test_an_optional_option_is_checked_as_the_plain_type(name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        options_of(optional)[name].read(value)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("keep", "5", 5),
        ("share", "0.25", 0.25),
        ("flag", "yes", True),
        ("text", "5", "5"),
        ("bounded", "1", 1.0),
        ("mode", "b", "b"),
        ("plain", "2", 2),
    ],
)
def test_text_is_parsed_by_the_type_within_a_union(name: str, text: str, value: Any) -> None:
    found = options_of(optional)[name].parse(text)
    assert (found, type(found)) == (value, type(value))
    for wrong in ("keep", "plain"):
        with pytest.raises(UsageError, match=f"^`{wrong}` must be a whole number.*, found 'x'$"):
            options_of(optional)[wrong].parse("x")


def test_a_choice_named_none_is_that_choice() -> None:
    option = METHODS["ties"].options["rescale"]
    assert option.parse("none") == "none"
    assert option.read(None) is None


def test_optional_options_reach_a_method_from_everywhere(tmp_path: Path) -> None:
    got: list[Any] = []

    @merge_method("picky")
    def picky(
        vectors: Any, *, keep: int | None = 3, share: Share | None = 1.0, flag: bool | None = True
    ) -> SparseTensor:
        got.append((keep, share, flag))
        return vectors.result(vectors.total())  # type: ignore[no-any-return]

    path = tmp_path / "one.lota"
    vectors()[0].save(path)
    for number, (texts, wanted) in enumerate(
        [
            ([], (3, 1.0, True)),
            (["keep=5", "share=0.5"], (5, 0.5, True)),
            (["keep=none", "flag=none"], (None, 1.0, None)),
        ]
    ):
        options = [word for text in texts for word in ("--option", text)]
        ok("merge", path, "--method", "picky", *options, "-o", tmp_path / f"{number}.lota")
        assert got[-1] == wanted
    said = refused(2, "merge", path, "--method", "picky", "--option", "share=2", "-o", tmp_path / "x.lota")
    assert "`share` must be at least 0 and at most 1, or None, found 2.0" in said

    for parameters, own, wanted in (
        ("{keep: 5, share: 0.5, flag: false}", "{}", (5, 0.5, False)),
        ("{keep: null, share: null, flag: null}", "{}", (None, None, None)),
        ("{share: null}", "{share: 0.25}", (3, 0.25, True)),
        ("{}", "{share: null}", (3, None, True)),
    ):
        assert by_recipe(tmp_path, "picky", parameters, own)["w"].values.tolist() == [1, 3]
        assert got[-1] == wanted
    for parameters, own, message in (
        ("{share: 2}", "{}", "share must be at least 0 and at most 1, or None, found 2.0$"),
        ("{keep: x}", "{}", "keep must be a whole number, or None, found 'x'$"),
        ("{share: x}", "{}", "share: expected a number, found 'x'$"),
        ("{flag: maybe}", "{}", "flag: expected true or false for all tensors, found 'maybe'$"),
        ("{}", "{share: [0, 1]}", r"share must be one number for all models, found \[0.0, 1.0\] for .* is 1.0\)$"),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(str(tmp_path))}/merge.yaml: {message}"):
            by_recipe(tmp_path, "picky", parameters, own)


def by_recipe(folder: Path, method: str, parameters: str, own: str = "{}") -> TaskVector:
    path = folder / "merge.yaml"
    path.write_text(
        f"merge_method: {method}\nmodels: [{{model: {folder}/one.lota, parameters: {own}}}]\nparameters: {parameters}\n"
    )
    return merged(path)


def test_a_recipe_names_its_keys_and_no_flags(tmp_path: Path) -> None:
    vectors()[0].save(tmp_path / "one.lota")
    for method, parameters, message in (
        ("disjoint", "{on_overlap: fight}", "on_overlap is one of error, sum, mean, larger, first, found 'fight'"),
        ("ties", "{density: [0.1, 0.2], dialect: reference}", "choose dialect: mergekit or dialect: peft, which trim"),
    ):
        path = tmp_path / "merge.yaml"
        path.write_text(
            f"merge_method: {method}\nmodels: [{{model: {tmp_path}/one.lota}}]\nparameters: {parameters}\n"
            if method == "disjoint"
            else f"merge_method: {method}\nmodels: [{{model: {tmp_path}/layers.lota}}]\nparameters: {parameters}\n"
        )
        if method == "ties":
            names = [f"model.layers.{layer}.w" for layer in range(2)]
            vector_of({name: sparse((4,), {0: 1}) for name in names}).save(tmp_path / "layers.lota")
        said = refused(2, "merge", "--recipe", path, "-o", tmp_path / "x.lota")
        assert message in said
        assert "--" not in said


def registered(function: Callable[[Any], object], **options: Any) -> TaskVector:
    """A merge by a method whose function is given."""
    METHODS.pop("mine", None)
    merge_method("mine", **options)(function)  # type: ignore[type-var]
    return merge(vectors(), "mine")


# the union of the positions of the vectors is 0 and 2, of 4
RESULTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "nothing": (lambda v: None, "the result must be a SparseTensor, as vectors.result(…) returns, found None"),
    "an array": (
        lambda v: v.total(),
        "the result must be a SparseTensor, as vectors.result(…) returns, found float32 [2]",
    ),
    "a list": (lambda v: [1.0], "the result must be a SparseTensor, as vectors.result(…) returns, found [1.0]"),
    "a smaller tensor": (lambda v: sparse((3,), {0: 1}), "the result must have the shape [4], found [3]"),
    "a larger tensor": (lambda v: sparse((9,), {8: 1}), "the result must have the shape [4], found [9]"),
    "another shape": (lambda v: sparse((2, 2), {3: 1}), "the result must have the shape [4], found [2, 2]"),
    "complex values": (
        lambda v: SparseTensor((4,), np.array([1]), np.array([1j])),
        "the values of the result must be f32 [1], found complex128 [1]",
    ),
    "NaN in a tensor": (
        lambda v: SparseTensor((4,), np.array([1, 2]), np.array([np.nan, 1], np.float32)),
        "the result must be finite f32 numbers, found 1 that are NaN or infinite",
    ),
    "too large for f32": (
        lambda v: SparseTensor((4,), np.array([1]), np.array([1e300])),
        "the result must be finite f32 numbers, found 1 that are NaN or infinite",
    ),
    "an index out of range": (
        lambda v: SparseTensor(v.shape, np.array([4]), np.ones(1, np.float32)),
        "the result is no valid tensor: indices 4 to 4 are out of range for 4 positions",
    ),
    "more values": (lambda v: v.result(np.ones(4)), "values must be f32 [2], found float64 [4]"),
    "one value": (lambda v: v.result(np.ones(1, np.float32)), "values must be f32 [2], found float32 [1]"),
    "rows of values": (lambda v: v.result(np.ones((2, 1))), "values must be f32 [2], found float64 [2, 1]"),
    "a list of values": (lambda v: v.result([1.0, 2.0]), "values must be f32 [2], found [1.0, 2.0]"),
    "no values": (lambda v: v.result(None), "values must be f32 [2], found None"),
    "a number": (lambda v: v.result(1.0), "values must be f32 [2], found 1.0"),
    "complex values of positions": (
        lambda v: v.result(np.ones(2, complex)),
        "values must be f32 [2], found complex128 [2]",
    ),
    "NaN": (
        lambda v: v.result(v.total() * np.nan),
        "the result must be finite f32 numbers, found 2 that are NaN or infinite",
    ),
    "infinity": (
        lambda v: v.result(np.array([1, np.inf])),
        "the result must be finite f32 numbers, found 1 that are NaN or infinite",
    ),
    "values beyond f32": (
        lambda v: v.result(np.array([1, 1e39])),
        "the result must be finite f32 numbers, found 1 that are NaN or infinite",
    ),
    "an overflow": (
        lambda v: v.result(v.total() * np.float32(3e38)),
        "the result must be finite f32 numbers, found 1 that are NaN or infinite",
    ),
    "whole numbers kept": (lambda v: v.result(v.total(), np.array([1, 0])), "kept must be bool [2], found int64 [2]"),
    "positions kept": (lambda v: v.result(v.total(), np.array([1])), "kept must be bool [2], found int64 [1]"),
    "too few kept": (lambda v: v.result(v.total(), np.array([True])), "kept must be bool [2], found bool [1]"),
    "a list kept": (lambda v: v.result(v.total(), [True, False]), "kept must be bool [2], found [True, False]"),
    "one bool kept": (lambda v: v.result(v.total(), True), "kept must be bool [2], found True"),
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("function", "message"), RESULTS.values(), ids=list(RESULTS))
def test_a_wrong_result_is_refused_by_the_name_of_the_method(
    function: Callable[[Any], object], message: str, whole: bool, tmp_path: Path
) -> None:
    merged = registered(function, whole_tensors=whole)
    with pytest.raises(MergeError) as refused:
        merged["w"]
    assert str(refused.value) == f"tensor 'w': the method mine: {message}"
    with pytest.raises(MergeError):
        merged.save(tmp_path / "x.lota")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "function",
    [
        lambda v: v.result(v.total()),
        lambda v: v.result(v.total().astype(np.float64), np.array([True, True])),
        lambda v: v.result(torch.tensor([1, 8]), torch.tensor([True, True])),
        lambda v: v.result(torch.tensor([1, 8], dtype=torch.bfloat16)),
        lambda v: v.result(torch.tensor([1.0, 8.0], requires_grad=True)),
        lambda v: SparseTensor(v.shape, np.array([0, 2]), np.array([1, 8])),
    ],
)
def test_results_of_any_real_dtype_become_f32(function: Callable[[Any], object]) -> None:
    merged = registered(function)["w"]
    assert oracle.entries(merged) == {0: 1, 2: 8}
    assert merged.values.dtype == np.float32


def test_values_that_are_not_kept_may_be_nan() -> None:
    merged = registered(lambda v: v.result(np.array([np.nan, 2]), np.array([False, True])))
    assert oracle.entries(merged["w"]) == {2: 2}


def mine(vectors: Any) -> Any:
    return vectors.result(vectors.total())


def test_the_arguments_of_merge_are_no_options() -> None:
    arguments = inspect.signature(library_merge).parameters.values()
    assert set(RESERVED) == {each.name for each in arguments if each.kind is not inspect.Parameter.VAR_KEYWORD}
    for name in RESERVED:
        namespace: dict[str, Any] = {}
        exec(f"def function(aligned, *, {name}=1): ...", namespace)
        with pytest.raises(UsageError) as refused:
            merge_method("mine")(namespace["function"])
        assert str(refused.value) == (
            f"the merge method 'mine': an option cannot have the name `{name}`, which is an argument of merge"
        )
        assert "mine" not in METHODS


def test_an_option_without_a_default_is_refused_at_registration() -> None:
    def function(vectors: Any, *, keep: int) -> Any: ...

    with pytest.raises(UsageError, match=r"^the merge method 'mine': the option `keep` needs a default$"):
        merge_method("mine")(function)
    assert "mine" not in METHODS
    merge_method("mine")(mine)
    assert oracle.entries(merge(vectors(), "mine")["w"]) == {0: 1, 2: 8}


def test_the_decorator_needs_a_name() -> None:
    known = set(METHODS)
    with pytest.raises(UsageError, match=r'^merge_method needs the name .* @merge_method\("median"\), found <function'):
        merge_method(mine)  # type: ignore[arg-type]
    assert set(METHODS) == known


NOTEBOOK = "@merge_method('mine')\ndef of_a_cell(vectors):\n    return vectors.result(vectors.total() * {factor})\n"


def test_a_function_that_is_registered_again_replaces_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"__name__": "__main__", "merge_method": merge_method}
    for factor in (2, 3):
        exec(NOTEBOOK.format(factor=factor), names)
        assert oracle.entries(merge(vectors(), "mine")["w"]) == {0: factor, 2: 8 * factor}
    with pytest.raises(UsageError, match=r"^a merge method 'mine' is already registered$"):
        exec(NOTEBOOK.format(factor=4).replace("of_a_cell", "another"), names)
    with pytest.raises(UsageError, match=r"^a merge method 'mine' is already registered$"):
        exec(NOTEBOOK.format(factor=4), {**names, "__name__": "elsewhere"})
    assert oracle.entries(merge(vectors(), "mine")["w"]) == {0: 3, 2: 24}
    del METHODS["mine"]

    module = tmp_path / "reloaded_methods.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    module.write_text("from taskvec.merging import merge_method\n" + NOTEBOOK.format(factor=5))
    loaded = importlib.import_module("reloaded_methods")
    module.write_text("from taskvec.merging import merge_method\n" + NOTEBOOK.format(factor=60))
    importlib.reload(loaded)
    assert oracle.entries(merge(vectors(), "mine")["w"]) == {0: 60, 2: 480}


def test_the_names_of_the_package_are_taken() -> None:
    for name in ("auto", *BUILT_IN):
        function = METHODS[name].combine if name in METHODS else mine
        with pytest.raises(UsageError, match=f"^a merge method '{name}' is already registered$"):
            merge_method(name)(function)
    assert METHODS["ties"].prune is not None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere_at_all:mine", "cannot be loaded: No module named 'nowhere_at_all'"),
        ("theirs_absent:mine", "cannot be loaded: module 'theirs_absent' has no attribute 'mine'"),
        ("theirs_absent:other", "does not register a merge method 'absent'"),
    ],
)
def test_an_entry_point_that_leads_nowhere_is_named(
    target: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs_absent.py").write_text("def other(vectors): ...\n")
    info = tmp_path / "absent-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: absent\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[taskvec.merge_methods]\nabsent = {target}\n")
    monkeypatch.syspath_prepend(tmp_path)
    said = f"the entry point 'absent = {target}' of the group taskvec.merge_methods {message}"
    with pytest.raises(UsageError) as refusal:
        merge(vectors(), "absent")
    assert str(refusal.value) == said
    vectors()[0].save(tmp_path / "one.lota")
    assert said in refused(2, "merge", tmp_path / "one.lota", "--method", "absent", "-o", tmp_path / "x.lota")


def test_the_documentation_lists_the_options_of_every_method() -> None:
    page = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")
    section = page.split("\n## Options of the methods\n")[1].split("\n## ")[0]
    listed: dict[str, set[str]] = {name: set() for name in BUILT_IN}
    for option, methods in re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE):
        for method in re.findall(r"`(\w+)`", methods):
            listed[method].add(option)
        assert f"\n- `{option}` " in section
    assert listed == {
        name: {*METHODS[name].options, *["density"] * (METHODS[name].prune is not None)} for name in BUILT_IN
    }
