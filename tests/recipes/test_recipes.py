"""mergekit's merge files: the same merges as from Python, and errors that name the file."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import oracle, recipes
from support.building import tensor, write_checkpoint

from taskvec import TaskVector, diff, merge
from taskvec.errors import UsageError
from taskvec.merging import Rule
from taskvec.recipes import Recipe, merge_recipe
from taskvec_formats import Checkpoint


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Checkpoint]:
    """A base and two fine-tunes as folders in the working directory, the first packed as well."""
    monkeypatch.chdir(tmp_path)
    dice = np.random.default_rng(0)
    base = {f"model.layers.{i}.{m}.weight": dice.normal(size=(6, 5)) for i in range(3) for m in ("mlp.up", "attn.q")}
    states = {"base": base}
    for name in ("a", "b"):
        states[name] = {n: w + dice.normal(size=w.shape) * (dice.random(w.shape) < 0.5) for n, w in base.items()}
    made = {
        name: write_checkpoint(tmp_path / name, {n: tensor("F32", w.astype(np.float32)) for n, w in weights.items()})
        for name, weights in states.items()
    }
    diff(made["base"], made["a"]).save(tmp_path / "a.lota")
    return made


def read(text: str) -> Recipe:
    Path("merge.yaml").write_text(textwrap.dedent(text), encoding="utf-8")
    return Recipe.read(Path("merge.yaml"))


def merged(text: str) -> TaskVector:
    read(text)
    return recipes.merged(Path("merge.yaml"))


def same(one: TaskVector, other: TaskVector) -> bool:
    return [oracle.exact(one[name]) for name in one] == [oracle.exact(other[name]) for name in other]


HEAD = (
    "base_model: base\nmodels:\n- {model: a.lota, parameters: {weight: 0.5}}\n- {model: b, parameters: {weight: -1}}\n"
)


@pytest.mark.parametrize(
    ("text", "method", "options"),
    [
        ("merge_method: task_arithmetic", "linear", {}),
        (
            "merge_method: task_arithmetic\nparameters: {normalize: true, lambda: 2}",
            "linear",
            {"normalize": True, "lam": 2},
        ),
        ("merge_method: ties\nparameters: {density: 0.3}", "ties", {"density": 0.3, "dialect": "mergekit"}),
        ("merge_method: ties", "ties", {"dialect": "mergekit"}),
        (
            "merge_method: ties\nparameters: {density: 0.3, normalize: false, int8_mask: true}",
            "ties",
            {"density": 0.3, "dialect": "mergekit", "normalize": False},
        ),
        (
            "merge_method: dare_ties\nparameters: {density: 0.5, seed: 3}",
            "dare_ties",
            {"density": 0.5, "dialect": "mergekit", "seed": 3, "normalize": False, "rescale": "norm"},
        ),
        (
            "merge_method: dare_linear\nparameters: {density: 0.5, rescale: false}",
            "dare_linear",
            {"density": 0.5, "dialect": "mergekit", "rescale": "none"},
        ),
        (
            "merge_method: breadcrumbs\nparameters: {density: 0.5, gamma: 1e-1}",
            "breadcrumbs",
            {"density": 0.5, "gamma": 0.1},
        ),
        ("merge_method: disjoint\nparameters: {on_overlap: larger}", "disjoint", {"on_overlap": "larger"}),
        ("merge_method: ties\nparameters: {dialect: peft, density: 0.4}", "ties", {"dialect": "peft", "density": 0.4}),
        ("merge_method: auto", "auto", {}),
    ],
)
def test_a_recipe_merges_as_python_does(
    models: dict[str, Checkpoint], text: str, method: str, options: dict[str, Any]
) -> None:
    vectors = [TaskVector.open("a.lota"), diff(models["base"], models["b"])]
    assert same(merged(HEAD + text), merge(vectors, method, [0.5, -1], **options))


def test_what_a_model_says_goes_before_what_holds_for_all(models: dict[str, Checkpoint]) -> None:
    found = merged("""
        merge_method: ties
        base_model: base
        parameters:
          weight: [{filter: attn, value: [0, 1]}, {value: 3}]
          density: 0.8
        models:
        - model: base
        - model: a.lota
          parameters:
            weight: [{filter: mlp, value: 0.5}]
            density: [0.2, 0.6]
        - model: b
    """)
    shared: list[Any] = [Rule([0.0, 1.0], "attn"), Rule(3.0)]
    expected = merge(
        [TaskVector.open("a.lota"), diff(models["base"], models["b"])],
        "ties",
        [[Rule(0.5, "mlp"), *shared], shared],
        density=[[0.2, 0.6], 0.8],
        dialect="mergekit",
    )
    assert same(found, expected)


def test_linear_averages_models_the_base_among_them(models: dict[str, Checkpoint]) -> None:
    found = merged("""
        merge_method: linear
        base_model: base
        models:
        - {model: base, parameters: {weight: 2}}
        - {model: a, parameters: {weight: 1}}
        - {model: b, parameters: {weight: 1}}
    """)
    for name in models["base"].tensors:
        base, a, b = (models[each].bits(name).view(np.float32).astype(np.float64) for each in ("base", "a", "b"))
        dense = np.zeros(30)
        dense[found[name].indices] = found[name].values
        assert np.allclose(base + dense, (2 * base + a + b) / 4, rtol=0, atol=1e-6)


def test_a_recipe_of_files_alone_needs_no_base(models: dict[str, Checkpoint]) -> None:
    text = "merge_method: task_arithmetic\nmodels: [{model: a.lota}]"
    assert read(text).open_start() is None
    assert same(merged(text), TaskVector.open("a.lota"))
    assert read(HEAD + "merge_method: ties\ndtype: float32\nout_dtype: bfloat16").dtype == "bfloat16"
    assert read(HEAD + "merge_method: ties\ndtype: float32\ntokenizer_source: base").dtype == "float32"


ONE = "models: [{model: a.lota}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected keys such as merge_method and models, found NoneType"),
        ("a: [", "is not YAML"),
        ("merge_method: ties\nmerge_method: linear\n" + ONE, "the key 'merge_method' is given twice"),
        (ONE, "merge_method must be the name of a method, found None"),
        (
            ONE + "merge_method: sleep",
            "merge_method: no merge method 'sleep'; known are arcee_fusion, auto, .*, ties$",
        ),
        (ONE + "merge_method: ties\nslices: []", "'models' and 'slices' exclude each other"),
        (ONE + "merge_method: ties\nmodules: {}", "'models' and 'modules' exclude each other"),
        ("merge_method: ties\nslices: []", "'slices' must be a list of slices"),
        ("merge_method: ties\nslices: [1]", "slice 1: expected sources, found 1"),
        ("merge_method: ties\nslices: [{sources: [{model: a}]}]", r"slice 1: layer_range must be \[FIRST, END\]"),
        (
            "merge_method: ties\nslices: [{sources: [{model: a, layer_range: [2, 2]}]}]",
            r"slice 1: layer_range must be \[FIRST, END\] with FIRST below END, found \[2, 2\]",
        ),
        (
            "merge_method: ties\n"
            "slices: [{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 2]}]}]",
            "slice 1: the sources must have equally many layers, found 1, 2",
        ),
        ("merge_method: ties\nmodules: {}", "'modules' must be names of modules"),
        ("merge_method: ties\nmodules: {default: 1}", "module default: expected models or slices, found 1"),
        (
            "merge_method: ties\nmodules: {default: {models: [{model: a}], slices: [1]}}",
            "module default: 'models' and 'slices' exclude each other",
        ),
        (ONE + "merge_method: ties\nparameters: [1]", "parameters must be names and values, found"),
        (ONE + "merge_method: ties\ntokenizer_source: [1]", "tokenizer_source must be base, union or a model"),
        (ONE + "merge_method: ties\ntokenizer_source: a\ntokenizer: {source: b}", "exclude each other"),
        (ONE + "merge_method: ties\ntokenizer: union", "tokenizer must be {source: …, tokens: …}, found 'union'"),
        (ONE + "merge_method: ties\ntokenizer: {tokens: 1}", "tokenizer: tokens must be tokens and the sources"),
        (
            ONE + "merge_method: ties\ntokenizer: {pad_to_multiple_of: 0}",
            "tokenizer: pad_to_multiple_of must be a whole number from 1 to 1048576, found 0",
        ),
        (
            ONE + "merge_method: ties\ntokenizer: {tokens: {x: {source: {kind: one}}}}",
            r"tokenizer: token x: a source is a model, {kind: zero} or {kind: model_token",
        ),
        (
            ONE + "merge_method: ties\ntokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
            "tokenizer: token x: a source is a model",
        ),
        (ONE + "merge_method: ties\ntokenizer: {tokens: {x: {force: 1}}}", "token x: force must be true or false"),
        (
            ONE + "merge_method: ties\nchat_template: 3",
            "chat_template must be auto, the name of a template or its text",
        ),
        (ONE + "merge_method: ties\nbase_model: {a: b}", "base_model must be a path or a Hub id"),
        ("merge_method: ties\nmodels: []", "'models' must be a list of models"),
        ("merge_method: ties\nmodels: [a.lota]", r"a model must be \{model: PATH, parameters: …\}, found 'a.lota'"),
        ("merge_method: ties\nmodels: [{model: a.lota, weight: 1}]", "unknown key of model a.lota 'weight'"),
        ("merge_method: ties\nmodels: [{model: a.lota, parameters: {lambda: 1}}]", "unknown parameter 'lambda'"),
        (ONE + "merge_method: ties\ndensity: 0.5", "unknown key 'density': settings belong under the 'parameters'"),
        (ONE + "merge_method: ties\ndtype: float64", "dtype is one of float32, bfloat16, float16, found 'float64'"),
        (
            ONE + "merge_method: ties\nparameters: {normalize: maybe}",
            "normalize: expected true or false for all tensors",
        ),
        (
            ONE + "merge_method: ties\nparameters: {density: [{filter: 3, value: 1}]}",
            "density: the filter of a rule must be text",
        ),
        (ONE + "merge_method: ties\nparameters: {lambda: .nan}", "lambda: expected a finite number, found nan"),
        (
            "merge_method: ties\nmodels: [{model: a.lota, parameters: {weight: abc}}]",
            "model a.lota: weight: expected a number",
        ),
    ],
)
def test_a_file_that_asks_for_what_cannot_be_done_is_refused(
    models: dict[str, Checkpoint], text: str, message: str
) -> None:
    with pytest.raises(UsageError, match=rf"^merge\.yaml.*{message}"):
        read(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: ties\nmodels: [{model: b}]", "b is a checkpoint: base_model must name its base"),
        ("merge_method: ties\nbase_model: base\nmodels: [{model: nowhere}]", "nowhere: no such file or folder"),
        (
            "merge_method: ties\nbase_model: base\nmodels: [{model: base}]",
            "nothing to merge: 'models' lists only base_model",
        ),
        (
            "merge_method: linear\nmodels: [{model: a.lota}]\nparameters: {normalize: false}",
            "would scale the base: use task_arithmetic",
        ),
        (ONE + "merge_method: slerp\nparameters: {t: 0.5}", "slerp merges whole models: base_model must name the base"),
        (ONE + "merge_method: ties\ntokenizer_source: union", "a tokenizer needs base_model"),
        (ONE + "merge_method: ties\ntokenizer: {source: base, pad_to_multiple_of: 64}", "a tokenizer needs base_model"),
        ("merge_method: ties\nmodules: {default: {models: [{model: a.lota}]}}", "modules need base_model"),
        (
            ONE + "merge_method: multislerp\nparameters: {normalize_weights: false}",
            "normalize_weights needs base_model: without it, multislerp merges task vectors",
        ),
        (
            "merge_method: ties\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\nbase_model: base",
            "slice 1: ties needs base_model among the sources of the slice",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 4]}]}]",
            "slice 1: a has 3 layers in model.layers, so layer_range cannot end at 4",
        ),
        ("merge_method: slerp\nmodels: [{model: a}, {model: b}]\nbase_model: a", "slerp needs t for tensor"),
        ("merge_method: slerp\nmodels: [{model: a}, {model: b}]", "slerp needs base_model to be one of the models"),
        (
            "merge_method: slerp\nmodels: [{model: a}, {model: b}]\nbase_model: base\nparameters: {t: 1}",
            "slerp merges 2 models, the base included, found 3",
        ),
        ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]", "passthrough merges 1 model, found 2"),
        (
            "merge_method: nuslerp\nmodels: [{model: a}]\nbase_model: base",
            "nuslerp merges 2 models beside base_model, found 1",
        ),
        ("merge_method: karcher\nmodels: [{model: a}, {model: a}]", "a is listed twice"),
        (
            "merge_method: karcher\nmodules: {tower: {models: [{model: a}]}}",
            "there is no module 'tower': a module is default, or a part of the names",
        ),
        ("merge_method: ties\nbase_model: base\nmodels: [{model: base+nowhere}]", "nowhere: no such adapter of peft"),
        (
            "merge_method: ties\nbase_model: a.lota\nmodels: [{model: b}]",
            "base_model must be a model, found the task vector",
        ),
        (
            "merge_method: karcher\nmodels: [{model: a}]\ntokenizer_source: base",
            "a: config.json does not exist|a has no tokenizer.json",
        ),
        (ONE + "merge_method: ties\nparameters: {weight: heavy}", "expected a number, found 'heavy'"),
        (ONE + "merge_method: ties\nparameters: {weight: true}", "expected a number, found True"),
        (
            ONE + "merge_method: ties\nparameters: {weight: [{filter: a}]}",
            "a rule must be {filter: NAME, value: NUMBER}",
        ),
        (
            ONE + "merge_method: breadcrumbs\nparameters: {gamma: [0, 1]}",
            "gamma must be one number for all models, found .0.0, 1.0. for a",
        ),
        (
            "merge_method: breadcrumbs\nbase_model: base\nmodels: [{model: a, parameters: {gamma: 0.1}}, {model: b}]",
            r"gamma must be one number for all models, found 0.01 for b \(the default is 0.01\)",
        ),
        (ONE + "merge_method: auto\nparameters: {gamma: 0.1}", "auto chooses the method and takes no options"),
        (
            "merge_method: breadcrumbs\nbase_model: base\nmodels: [{model: b}, {model: b, parameters: {gamma: 0.1}}]",
            "gamma must be one number for all models, found 0.1 for b",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(models: dict[str, Checkpoint], text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merged(text)


def test_keys_that_mergekit_passes_over_are_taken_and_said(models: dict[str, Checkpoint]) -> None:
    found = merged("""
        merge_method: task_arithmetic
        speed: 3
        chat_template: auto
        parameters: {density: 0.5, int8_mask: true, epsilon: 1, normalize: "no"}
        models:
        - {model: a.lota, note: the first, parameters: {gamma: 0.1, weight: 2}}
    """)
    assert found.provenance["notes"] == [
        "the key speed has no effect",
        "density has no effect on task_arithmetic",
        "int8_mask has no effect on task_arithmetic",
        "epsilon has no effect on task_arithmetic",
        "model a.lota: the key note has no effect",
        "model a.lota: gamma has no effect on task_arithmetic",
    ]
    assert same(found, 2 * TaskVector.open("a.lota"))
    for method in ("ties", "linear", "breadcrumbs", "dare_ties"):
        base = "base_model: base\n" if method == "linear" else ""
        said = merged(f"{base}{ONE}merge_method: {method}\nparameters: {{epsilon: 1}}").provenance["notes"]
        assert f"epsilon has no effect on {method}" in said


def test_rules_that_fit_no_tensor_leave_densities_and_lambda_at_1(models: dict[str, Checkpoint]) -> None:
    rules = "[{filter: mlp, value: 0.3}]"
    found = merged(f"{HEAD}merge_method: ties\nparameters: {{density: {rules}, lambda: {rules}}}")
    expected: list[Any] = [Rule(0.3, "mlp"), Rule(1.0)]
    vectors = [TaskVector.open("a.lota"), diff(models["base"], models["b"])]
    assert same(found, merge(vectors, "ties", [0.5, -1], density=[expected] * 2, lam=expected, dialect="mergekit"))


def test_there_must_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        Recipe.read(tmp_path / "merge.yaml")
    (tmp_path / "merge.yaml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="cannot be read as UTF-8"):
        Recipe.read(tmp_path / "merge.yaml")


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("merged.lota", {"dtype": "bfloat16"}, "`dtype` is for a model folder, not for a .lota file"),
        ("merged.lota", {"shard_size": 1000}, "`shard_size` is for a model folder, not for a .lota file"),
        ("merged", {"codec": "fast"}, "`codec` is for a .lota file, not for a model folder"),
    ],
)
def test_arguments_without_effect_on_the_output_are_refused(
    models: dict[str, Checkpoint], out: str, options: dict[str, Any], message: str
) -> None:
    Path("merge.yaml").write_text(HEAD + "merge_method: ties")
    with pytest.raises(UsageError, match=message):
        merge_recipe("merge.yaml", out, **options)
    assert not Path(out).exists()
