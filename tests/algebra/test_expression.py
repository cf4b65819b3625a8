"""Expressions mean what they would mean in Python; what is none is refused by one sentence that names the character."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.building import contents, package, sparse, tensor, vector_of, write_checkpoint
from support.commands import ok, refused, taskvec

from taskvec import TaskVector, apply, compose, diff
from taskvec.algebra.expression import WORDS, Expression
from taskvec.errors import UsageError
from taskvec_formats import ModelFolder

VECTORS = {
    name: vector_of({"w": sparse((4,), {at: at + 1.5, 3: -0.1 * at})}, name=name) for at, name in enumerate("abc")
}
SPACE = st.sampled_from(["", " ", "  ", "\n"])
LEAVES = st.sampled_from([*"abc", "2", "0.5", "1e-3", ".25", "3.", "0"])


def larger(inner: oracle.Strategy) -> oracle.Strategy:
    wide = st.tuples(inner, st.sampled_from([" + ", " - ", " / ", " * ", "*", " -", " +"]), inner).map("".join)
    return wide | inner.map("-{}".format) | st.tuples(SPACE, inner, SPACE).map(lambda parts: f"({''.join(parts)})")


def evaluated(text: str, vectors: Mapping[str, TaskVector] = VECTORS, **more: Any) -> TaskVector:
    return Expression(text).evaluate(vectors.__getitem__, **more)


def same(a: TaskVector, b: TaskVector) -> bool:
    return (a.name, a.provenance, oracle.exact(a["w"])) == (b.name, b.provenance, oracle.exact(b["w"]))


@settings(max_examples=400)
@given(st.recursive(LEAVES, larger, max_leaves=12))
def test_an_expression_is_what_python_takes_it_for(text: str) -> None:
    try:
        # every number of an expression is a float; 0 + a is for Python's sum()
        floats = re.sub(r"(?<![\w.])([02])(?![\w.])", r"\1.0", text)
        expected = eval(floats.replace("\n", " ").strip(), {}, dict(VECTORS))
    except (TypeError, ZeroDivisionError, UsageError):
        expected = None
    if isinstance(expected, TaskVector):
        assert same(evaluated(text), expected)
        return
    with pytest.raises(UsageError):
        evaluated(text)


A, B, C = VECTORS.values()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", A),
        ("((a))", A),
        ("  a ", A),
        ("0.5*a + b - c", 0.5 * A + B - C),
        ("a - (b - c)", A - (B - C)),
        ("a -b", A - B),
        ("a +b", A + B),
        ("(a)-b", A - B),
        ("a-(b)", A - B),
        ("(a)/2", A / 2),
        ("a/(4)", A / 4),
        ("'a'/2", A / 2),
        ('"a"*2', A * 2),
        ("2*-a", -2 * A),
        ("- - -a", -A),
        ("a / 4 / 2", A / 4 / 2),
        ("1 / 4*a", 0.25 * A),
        ("-(2 - 3)*a", A),
        ("1e-3*a", 1e-3 * A),
        ("2.5E+2*a", 250 * A),
    ],
)
def test_operators_are_found_beside_white_space_and_parentheses(text: str, expected: TaskVector) -> None:
    assert same(evaluated(text), expected)


@pytest.mark.parametrize(
    "name", ["runs/x-1.lota", "/abs/a+b.lota", "a>>b", "1-2", "2/3", "x>y", "it's", "a.b-", "1e", "ä"]
)
def test_names_hold_what_operators_are_made_of(name: str) -> None:
    for text in (name, f"2*{name} - {name}", f"({name})", f"-{name} / 2 + {name}*1.5"):
        assert same(evaluated(text, {name: A}), evaluated(text.replace(name, "a")))


@pytest.mark.parametrize("name", ["a b", "a*b", "f(x)", "3", "-a", " ", "it's", 'say "x"'])
def test_names_in_quotation_marks_hold_anything(name: str) -> None:
    mark = "'" if '"' in name else '"'
    assert same(evaluated(f"2*{mark}{name}{mark}", {name: A}), 2 * A)


def test_composition_binds_least_and_to_the_left(tmp_path: Path) -> None:
    values = [1.0, 2, 4, 8]
    states = [write_checkpoint(tmp_path / f"{v}", {"w": tensor("F32", [v])}) for v in values]
    steps = {f"s{i}": diff(*states[i : i + 2]) for i in range(3)}
    for name, step in steps.items():
        step.name = name
    by_hand = compose(compose(steps["s0"], steps["s1"], states[0]), steps["s2"], states[0])
    for text in ("s0 >> s1 >> s2", "(s0 >> s1)>>(s2)", "s0 >>s1 >> s2"):
        found = evaluated(text, steps, base=states[0])
        assert (found.name, found.provenance) == (by_hand.name, by_hand.provenance)
        assert oracle.entries(found["w"]) == {0: 7.0}
    summed = evaluated("2*s0 - s0 >> s1", steps, base=states[0])
    assert summed.name == "-1 * s0 + 2 * s0 >> s1"
    assert oracle.entries(summed["w"]) == {0: 3.0}


def test_a_file_is_opened_once_and_none_before_the_whole_is_understood() -> None:
    opened: list[str] = []

    def open_vector(name: str) -> TaskVector:
        opened.append(name)
        return VECTORS[name]

    Expression("b - 'b'*2 + (a)").evaluate(open_vector)
    assert opened == ["b", "a"]
    for wrong in ("a + ", "a b", "(a"):
        with pytest.raises(UsageError):
            Expression(wrong).evaluate(open_vector)
    assert opened == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the expression is empty: expected a vector or a number"),
        (" \t", "the expression is empty: expected a vector or a number"),
        ("a +", "the expression ends with '+': expected a vector or a number"),
        ("a - b *", "the expression ends with '*': expected a vector or a number"),
        ("(", "the expression ends with '(': expected a vector or a number"),
        ("()", "character 2 of the expression: expected a vector or a number, found ')'"),
        ("(a", "character 1 of the expression: this parenthesis is never closed"),
        ("a - (b + (c)", "character 5 of the expression: this parenthesis is never closed"),
        ("a)", "character 2 of the expression: this parenthesis was never opened"),
        ("(a)) + b", "character 4 of the expression: this parenthesis was never opened"),
        ("a b", "character 3 of the expression: expected an operator, found 'b'"),
        ("2 a", "character 3 of the expression: expected an operator, found 'a'"),
        ("(a)(b)", "character 4 of the expression: expected an operator, found '('"),
        ("a /b", "character 3 of the expression: expected an operator, found '/b'"),
        ("a + * b", "character 5 of the expression: expected a vector or a number, found '*'"),
        ("+a", "character 1 of the expression: expected a vector or a number, found '+'"),
        ("a**2", "character 3 of the expression: expected a vector or a number, found '*'"),
        (">> a", "character 1 of the expression: expected a vector or a number, found '>>'"),
        ("a - 'b", "character 5 of the expression: this quotation mark is never closed"),
        ("2", "the expression is a number, 2: expected a vector"),
        ("(1 + 1)*1.5 - 0.5", "the expression is a number, 2.5: expected a vector"),
        ("a + 3", "character 3 of the expression: + takes two vectors or two numbers, found a vector and a number"),
        ("3 - a", "character 3 of the expression: - takes two vectors or two numbers, found a number and a vector"),
        ("a*b", "character 2 of the expression: * takes numbers and at most one vector, found two vectors"),
        ("2 / a", "character 3 of the expression: / takes a number after it, found a number and a vector"),
        ("a / b", "character 3 of the expression: / takes a number after it, found two vectors"),
        ("a >> 2", "character 3 of the expression: >> takes two vectors, found a vector and a number"),
        ("0.5 >> 0.5", "character 5 of the expression: >> takes two vectors, found two numbers"),
        ("2 >> a", "character 3 of the expression: >> takes two vectors, found a number and a vector"),
        ("0 + a", "character 3 of the expression: + takes two vectors or two numbers, found a number and a vector"),
        ("1e999 - 1e999", "the expression is a number, nan: expected a vector"),
        ("1" * 400 + " * a", "the factor of a must be a finite number, found inf"),
        ("(1e999 - 1e999)*a", "the factor of a must be a finite number, found nan"),
        ("a " + "b" * 100, f"character 3 of the expression: expected an operator, found '{'b' * 56}..."),
        ("a / (1 - 1)", "character 3 of the expression: cannot divide by zero"),
        ("1 / 0*a", "character 3 of the expression: cannot divide by zero"),
        ("1e999*a", "the factor of a must be a finite number, found inf"),
        ("a / 1e999", "a can only be divided by a finite non-zero number, found inf"),
    ],
)
def test_what_is_no_expression_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        evaluated(text)
    assert str(error.value) == message


@pytest.mark.parametrize("text", ["''", '""', "'a\0b'", "x" * 5000, "'" + "x/" * 3000 + "'", "1" * 50_000 + "x"])
def test_what_cannot_be_the_name_of_a_file_is_no_file(text: str) -> None:
    with pytest.raises(UsageError, match=r"^character 1 of the expression: there is no file '[^\n]{0,260}$"):
        Expression(text).evaluate()


def test_a_number_may_have_any_number_of_digits() -> None:
    assert same(evaluated("0.5" + "0" * 5000 + "*a"), 0.5 * A)


def test_a_chain_may_be_grouped_either_way(tmp_path: Path) -> None:
    """Without the base too, where the parts lead to checkpoints: A -> B -> C -> D, all three change one weight."""
    values = [[1.0, 2, 3, 4], [1.5, 2, 3, 4], [1.1, 2, 5, 4], [0.3, 7, 5, 4]]
    states = [write_checkpoint(tmp_path / f"{i}", {"w": tensor("F32", each)}) for i, each in enumerate(values)]
    for i in range(3):
        diff(*states[i : i + 2]).save(tmp_path / f"s{i}.lota")
    steps = {f"s{i}": TaskVector.open(tmp_path / f"s{i}.lota") for i in range(3)}
    for text in ("s0 >> s1 >> s2", "s0 >> (s1 >> s2)", "(s0 >> s1) >> s2", "s0 >> (s1) >> (s2)"):
        chained = evaluated(text, steps)
        assert chained.header.tuned is None
        assert chained.leads_to == steps["s2"].header.tuned
        apply(chained, states[0], tmp_path / "out", force=True)
        found = ModelFolder(tmp_path / "out").bits("w").view("<f4")
        np.testing.assert_allclose(found, np.float32(values[-1]), rtol=1e-6)
        beside = evaluated(text, steps, base=states[0])
        assert apply(beside, states[0], tmp_path / "exact", force=True).exact
        assert contents(ModelFolder(tmp_path / "exact")) == contents(states[-1])


def test_patches_are_grouped_either_way_beside_the_base(tmp_path: Path) -> None:
    states = [write_checkpoint(tmp_path / f"{i}", {"w": tensor("BF16", [i + 1.0, 2, 3])}) for i in range(4)]
    steps = {f"s{i}": diff(*states[i : i + 2], kind="patch") for i in range(3)}
    for text in ("s0 >> s1 >> s2", "s0 >> (s1 >> s2)"):
        assert apply(evaluated(text, steps, base=states[0]), states[0], tmp_path / "out", force=True).exact


def test_a_stored_chain_that_is_not_exact_needs_its_parts_or_the_base(tmp_path: Path) -> None:
    values = [[1.0], [1.5], [1.1], [0.3]]
    states = [write_checkpoint(tmp_path / f"{i}", {"w": tensor("F32", each)}) for i, each in enumerate(values)]
    steps = {f"s{i}": diff(*states[i : i + 2]) for i in range(3)}
    evaluated("s0 >> s1", steps).save(tmp_path / "two.lota")
    steps["two"] = TaskVector.open(tmp_path / "two.lota")
    with pytest.raises(UsageError, match=r"give the base \(`base`\), or compose the vectors that it was made of$"):
        evaluated("two >> s2", steps)
    assert apply(evaluated("two >> s2", steps, base=states[0]), states[0], tmp_path / "out", force=True).exact


@pytest.mark.parametrize("sign", ["-", "(", ")", "a", "a + ", "'", "* ", "1 ", "2*(-"])
def test_no_length_of_an_expression_is_too_much(sign: str) -> None:
    with pytest.raises(
        UsageError, match=rf"^an expression has at most {WORDS} names, numbers and signs, found \d+$|^character"
    ):
        Expression(sign * 50_000 if sign != "a" else "a " * 50_000)


@pytest.mark.parametrize(
    "text",
    ["(" * 99 + "b" + ")" * 99, "-" * (WORDS - 1) + "b", " + ".join("b" * (WORDS // 2))],
    ids=["parentheses", "signs", "vectors"],
)
def test_the_longest_expressions_are_read(text: str, tmp_path: Path) -> None:
    evaluated(text).save(tmp_path / "x.lota")
    assert len(TaskVector.open(tmp_path / "x.lota")["w"]) == 2


def test_the_longest_chains_are_read(tmp_path: Path) -> None:
    steps = WORDS // 2
    states = [
        write_checkpoint(tmp_path / f"{i}", {"w": tensor("F32", np.arange(steps) * (np.arange(steps) <= i))})
        for i in range(steps + 1)
    ]
    vectors = {f"s{i}": diff(*states[i : i + 2]) for i in range(steps)}
    for base in (None, states[0]):
        evaluated(" >> ".join(vectors), vectors, base=base).save(tmp_path / "x.lota", force=True)
        assert apply(TaskVector.open(tmp_path / "x.lota"), states[0], tmp_path / "out", force=True).exact
        assert contents(ModelFolder(tmp_path / "out")) == contents(states[-1])


@pytest.mark.parametrize(
    ("name", "hint"),
    [("absent.lota", ""), ("a.lota-b.lota", ": put white space around operators")],
)
def test_a_file_that_is_not_there_is_named(name: str, hint: str) -> None:
    message = refused(2, "arith", f"2*{name}", "-o", "never.lota")
    assert message == f"taskvec: character 3 of the expression: there is no file '{name}'{hint}\n"


# end to end


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a base and a.lota, b.lota, c.lota, whose values add up exactly."""
    values = {"base": [1.0, 2, 3, 4], "a": [1.5, 2, 3, 4], "b": [1.25, 2, 5, 4], "c": [1.0, 2, 6, 9]}
    states = {
        name: write_checkpoint(tmp_path / name, {"w": tensor("F32", each), "v": tensor("BF16", each)}, 1, {name: b"1"})
        for name, each in values.items()
    }
    for name in "abc":
        diff(states["base"], states[name]).save(tmp_path / f"{name}.lota")
    return tmp_path


def values(folder: Path) -> list[float]:
    return ModelFolder(folder).bits("w").view("<f4").tolist()


def test_an_analogy(tasks: Path) -> None:
    said = ok("arith", "a.lota - b.lota + c.lota", "-o", "d.lota", cwd=tasks, run=taskvec)
    assert said.startswith("d.lota: 6 entries of 8 eligible weights")
    ok("unpack", tasks / "d.lota", "--base", tasks / "base", "-o", tasks / "out")
    assert values(tasks / "out") == [1.25, 2, 4, 9]
    opened = [TaskVector.open(tasks / f"{name}.lota") for name in "abc"]
    (opened[0] - opened[1] + opened[2]).save(tasks / "e.lota")
    assert (tasks / "d.lota").read_bytes() == (tasks / "e.lota").read_bytes()


@pytest.mark.parametrize("arguments", [["(-a.lota)"], [" -a.lota"], ["--", "-a.lota"]], ids=" ".join)
def test_a_task_is_unlearnt_by_its_negation(arguments: list[str], tasks: Path) -> None:
    ok("arith", "-o", "d.lota", *arguments, cwd=tasks)
    ok("unpack", tasks / "d.lota", "--base", tasks / "base", "-o", tasks / "out")
    assert values(tasks / "out") == [0.5, 2, 3, 4]


@pytest.mark.parametrize("kind", ["vector", "patch"])
def test_a_chain_of_two_leads_to_the_last(kind: str, tasks: Path) -> None:
    for start, end in (("base", "a"), ("a", "c")):
        ok("pack", tasks / start, tasks / end, "-o", tasks / f"{start}-{end}.lota", "--kind", kind)
    steps = (tasks / "base-a.lota", tasks / "a-c.lota")
    ok("arith", " >> ".join(map(str, steps)), "--base", tasks / "base", "-o", tasks / "d.lota")
    said = ok("unpack", tasks / "d.lota", "--base", tasks / "base", "-o", tasks / "out")
    assert said.endswith("the tuned checkpoint, byte for byte\n")
    assert package(tasks / "out") == package(tasks / "c")
    assert "applies to" in ok("verify", tasks / "d.lota", "--base", tasks / "base")
    if kind == "patch":
        needs = f"{steps[0].name} is a patch, which can only be read with its base: give the base (--base)"
        assert needs in refused(2, "arith", " >> ".join(map(str, steps)), "-o", tasks / "e.lota")


def test_the_report_as_json(tasks: Path) -> None:
    report = json.loads(ok("arith", "2*a.lota - a.lota", "-o", "d.lota", "--json", cwd=tasks))
    vector = TaskVector.open(tasks / "a.lota")
    digest = vector.digest
    assert report["provenance"] == {
        "made_by": "arith",
        "parents": [{"name": "a.lota", "weight": weight, "digest": digest} for weight in (-1.0, 2.0)],
        "ancestors": {digest: vector.provenance},
    }
    assert (report["path"], report["kind"], report["entries"], report["tuned"]) == ("d.lota", "vector", 2, None)
    assert "tensors" not in report


def test_one_vector_is_written_as_it_is(tasks: Path) -> None:
    ok("arith", "1*a.lota", "-o", "d.lota", cwd=tasks)
    assert (tasks / "d.lota").read_bytes() == (tasks / "a.lota").read_bytes()


def test_an_output_replaces_another_file_but_not_what_it_is_made_of(tasks: Path) -> None:
    before, a = (tasks / "a.lota").read_bytes(), TaskVector.open(tasks / "a.lota")
    assert "exists already; --force replaces it" in refused(2, "arith", "2*a", "-o", tasks / "a.lota")
    assert "a.lota is an input" in refused(2, "arith", f"2*{tasks / 'a.lota'}", "-o", tasks / "a.lota", "--force")
    assert (tasks / "a.lota").read_bytes() == before
    ok("arith", "2*a.lota", "-o", "b.lota", "--force", cwd=tasks)
    assert oracle.exact(TaskVector.open(tasks / "b.lota")["w"]) == oracle.exact((2 * a)["w"])


def test_bad_requests_leave_nothing(tasks: Path) -> None:
    a, out = tasks / "a.lota", tasks / "d.lota"
    before = sorted(tasks.iterdir())
    for code, message, *arguments in (
        (2, "expected an operator, found 'x'", f"{a} x"),
        (2, "the expression is empty", ""),
        (2, "there is no file 'x'", f"{a} - x"),
        (2, "takes two vectors, found a vector and a number", f"{a} >> 2"),
        (2, "--base is for >>, which the expression does not contain", f"{a}*2", "--base", tasks / "base"),
        # before a model is looked for, which might have to be downloaded
        (2, "this parenthesis is never closed", f"({a} >> {a}", "--base", tasks / "absent"),
        (2, "no such file or folder", f"{a} >> {a}", "--base", tasks / "absent"),
        (1, "a.lota starts from base", f"{a} >> {a}"),
        (1, "is applied to base + a.lota already", f"{a} >> {a}", "--base", tasks / "base"),
        (1, "tensor 'v': a weighted sum leaves the range of f32", f"1e39*{a}"),
        (2, "not a .lota file", str(tasks / "base" / "model.safetensors")),
    ):
        assert message in refused(code, "arith", "-o", out, *arguments)
    assert sorted(tasks.iterdir()) == before
    assert contents(ModelFolder(tasks / "base"))


def test_a_chain_without_the_base_is_called_exact_where_it_is(tasks: Path) -> None:
    write_checkpoint(tasks / "d", {"w": tensor("F32", [1.5, 2, 3, 7]), "v": tensor("BF16", [1.5, 2, 3, 7])})
    for start, end, exact in (("a", "d", True), ("b", "c", None)):
        diff(ModelFolder(tasks / start), ModelFolder(tasks / end)).save(tasks / "next.lota", force=True)
        ok("arith", f"{start}.lota >> next.lota", "-o", "x.lota", "--force", cwd=tasks)
        assert (
            apply(TaskVector.open(tasks / "x.lota"), ModelFolder(tasks / "base"), tasks / "out", force=True).exact
            is exact
        )
        assert values(tasks / "out") == values(tasks / end)
