"""Odd YAML documents as recipes: nothing but a UsageError of one short line comes out."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.attacks.recipes import ODD

from taskvec.documents import LARGEST, read_document
from taskvec.errors import UsageError
from taskvec.recipes import Recipe


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        Recipe.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 500
    return message


@pytest.mark.parametrize(("text", "message"), ODD.items(), ids=[str(i) for i in range(len(ODD))])
def test_an_odd_document_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(text, encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert message in refusal(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_recipe_is_a_small_regular_file(tmp_path: Path) -> None:
    assert "it is a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "it is not a regular file" in refusal(tmp_path / "pipe")
    (tmp_path / "large").write_text("#" * (LARGEST + 1))
    assert "larger than 65,536 bytes" in refusal(tmp_path / "large")
    (tmp_path / "not text").write_bytes(b"\xff")
    assert "cannot be read as UTF-8" in refusal(tmp_path / "not text")
    assert "no such file" in refusal(tmp_path / "nowhere")


HEAD = "merge_method: {method}\nmodels:\n- {{model: a.lota, parameters: {own}}}\nparameters: {shared}\n{more}\n"
VALUES = [
    "1" + "0" * 400,
    "-1" + "0" * 400,
    ".nan",
    "-.inf",
    "1e999",
    "true",
    "null",
    "abc",
    "2024-01-01",
    "[]",
    "[[1]]",
    "[1, [2]]",
    "[1, {value: 1}]",
    "{value: [[1]]}",
    "{value: {value: 1}}",
    "{filter: 3, value: 1}",
    "{filter: [a], value: 1}",
    "{filter: a}",
    "{value: 1, filter: a, more: 1}",
    "{}",
    "'" + "x" * 2000 + "'",
    "'\\e[31m\\n'",
    '"\\e[31m\\n"',
]


@pytest.mark.parametrize("name", ["weight", "density", "gamma", "lambda", "normalize", "rescale"])
def test_a_setting_that_is_no_number_names_file_model_and_setting(name: str, tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    for value in VALUES:
        if name in ("normalize", "rescale") and value == "true":
            continue
        method = "breadcrumbs"
        path.write_text(HEAD.format(method=method, own="{}", shared=f"{{{name}: {value}}}", more=""), encoding="utf-8")
        assert f"{path}: {name}: " in refusal(path)
        if name in ("weight", "density", "gamma"):
            text = HEAD.format(method=method, own=f"{{{name}: {value}}}", shared="{}", more="")
            path.write_text(text, encoding="utf-8")
            assert f"{path}: model a.lota: {name}: " in refusal(path)


@pytest.mark.parametrize("key", ["merge_method", "models", "base_model", "parameters", "dtype", "tokenizer", "nothing"])
def test_a_key_may_hold_anything_and_no_other_error_comes_out(key: str, tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    documents = {"merge_method": "ties", "models": "[{model: a.lota}]"}
    for value in [*VALUES, "[{model: 1}]", "[{model: a, parameters: 1}]", "[a]", "[null]", "[{}]", "{source: [1]}"]:
        text = "\n".join(f"{name}: {each}" for name, each in {**documents, key: value}.items())
        path.write_text(text, encoding="utf-8")
        try:
            said: list[str] = list(Recipe.read(path).notes)
        except UsageError as error:
            said = [str(error)]
        assert all(each.isprintable() and len(each) < len(str(path)) + 500 for each in said)


TOKENS = [
    "a",
    "merge_method",
    ": ",
    "\n",
    "- ",
    "[",
    "]",
    "{",
    "}",
    ", ",
    "&a ",
    "*a",
    "!!int ",
    "? ",
    "1",
    "'",
    '"',
    "  ",
]


@given(st.lists(st.sampled_from(TOKENS), max_size=25), st.text(max_size=10))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, tokens: list[str], text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text("".join([*tokens, text]), encoding="utf-8", errors="replace")
    try:
        document = read_document(path)
    except UsageError as error:
        document = str(error)
        assert document.isprintable()
    assert isinstance(document, (dict, list, str, int, float, bool, type(None)))


@pytest.mark.parametrize(("method", "name"), [("slerp", "t"), ("nearswap", "t"), ("karcher", "tol")])
def test_a_parameter_that_all_models_share_is_refused_for_one(method: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    own = f"models: [{{model: a}}, {{model: b, parameters: {{{name}: 0.9}}}}]\n"
    path.write_text(f"merge_method: {method}\nbase_model: a\nparameters: {{{name}: 0.5}}\n{own}", encoding="utf-8")
    assert refusal(path).endswith(
        f"model b: unknown parameter '{name}': it belongs under the 'parameters' of the document"
    )


@pytest.mark.parametrize(("method", "noted"), [("ties", True), ("nuslerp", True), ("linear", False)])
def test_parameters_of_the_base_are_noted_where_they_have_no_effect(method: str, noted: bool, tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    listed = "[{model: base, parameters: {weight: 0.3}}, {model: a, parameters: {weight: 1}}]"
    slices = "slices: [{sources: [{model: base, layer_range: [0, 1], parameters: {weight: 0.3}}]}]"
    for models in (f"models: {listed}", slices):
        path.write_text(f"merge_method: {method}\nbase_model: base\n{models}\n", encoding="utf-8")
        said = "model base: weight has no effect, because this is the base"
        assert (said in Recipe.read(path).notes) == noted


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        ("{pad_to_multiple_of: 1000000000000000000000000}", "pad_to_multiple_of must be a whole number from 1 to"),
        ("{tokens: {'': }}", "a token must be text of at least one character"),
        ('{tokens: {"\\ud83d": }}', "a token must be text of at least one character"),
    ],
)
def test_vocabularies_that_no_model_can_have_are_refused(tokenizer: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(f"merge_method: linear\nmodels: [{{model: a}}]\ntokenizer: {tokenizer}\n", encoding="utf-8")
    assert said in refusal(path)
