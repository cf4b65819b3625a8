"""Models of one base in several dtypes: deltas from the base's values, results in the widest dtype, one rounding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.building import tensor, write_checkpoint
from support.recipes import merged, merged_folder

from taskvec import TaskVector, diff, merge
from taskvec.applying.apply import apply
from taskvec.applying.output import Output
from taskvec.errors import DTypeError, MergeError
from taskvec.recipes import Recipe
from taskvec.vectors.promotion import promoted
from taskvec_formats import Checkpoint, ModelFolder
from taskvec_formats.checkpoint import INDEX
from taskvec_formats.dtypes import DTYPES

SHAPE = (6, 5)
NARROW = ("F16", "BF16", "F32")


def values(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def model(folder: Path, seed: int, dtype: str, shards: int = 1) -> Checkpoint:
    tensors = {name: tensor(dtype, values(seed + i)) for i, name in enumerate(("layers.0.w", "layers.1.w", "norm"))}
    return write_checkpoint(folder, tensors | {"ids": tensor("I64", [1, 2])}, shards)


def read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    dtype = checkpoint.tensors[name].dtype
    return checkpoint.bits(name).view(dtype.real).astype(np.float32)


def rounded(dtype: str, numbers: np.ndarray) -> np.ndarray:
    """Round numbers to a dtype."""
    found = tensor(dtype, numbers.astype(np.float32))
    return found.bits.view(found.dtype.real).astype(np.float32)


def names_of(checkpoint: Checkpoint) -> set[str]:
    return {info.dtype.name for name, info in checkpoint.tensors.items() if name != "ids"}


def recipe(folder: Path, text: str) -> Path:
    (folder / "merge.yaml").write_text(text, encoding="utf-8")
    return folder / "merge.yaml"


def linear(folder: Path, models: list[Checkpoint], weights: list[float], more: str = "") -> Path:
    """Write a recipe that averages models."""
    listed = [f"{{model: {m.path}, parameters: {{weight: {w}}}}}" for m, w in zip(models, weights, strict=True)]
    return recipe(folder, f"merge_method: linear\nmodels: [{', '.join(listed)}]\n{more}")


def test_dtypes_are_promoted_as_torch_does() -> None:
    import torch

    names = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    for one, first in names.items():
        for other, second in names.items():
            found = promoted(DTYPES[one], DTYPES[other])
            assert found is not None
            assert names[found.name] == torch.promote_types(first, second)
    assert promoted(DTYPES["F8_E4M3"], DTYPES["F32"]) is None
    assert promoted(DTYPES["I64"], DTYPES["I64"]) == DTYPES["I64"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("other", NARROW)
@pytest.mark.parametrize("own", NARROW)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_sum_of_models_has_the_widest_dtype(own: str, other: str, packed: bool, shards: int, tmp_path: Path) -> None:
    base, first = model(tmp_path / "base", 0, own, shards), model(tmp_path / "first", 10, other)
    second = model(tmp_path / "second", 20, own)
    if packed:
        diff(base, first).save(tmp_path / "first.lota")
    asked = recipe(
        tmp_path,
        f"merge_method: task_arithmetic\nbase_model: {base.path}\nmodels:\n"
        f"- {{model: {tmp_path / ('first.lota' if packed else 'first')}, parameters: {{weight: 0.3}}}}\n"
        f"- {{model: {second.path}, parameters: {{weight: 0.7}}}}\n",
    )
    merged_folder(asked, tmp_path / "out")
    merged(asked).save(tmp_path / "merged.lota")
    apply(TaskVector.open(tmp_path / "merged.lota"), base, tmp_path / "again")
    widest = own if own == other else "F32"
    for folder in ("out", "again"):
        out = ModelFolder(tmp_path / folder)
        assert names_of(out) == {widest}
        for name in ("layers.0.w", "layers.1.w", "norm"):
            start = read(base, name)
            parts = [rounded(widest, read(each, name) - start) for each in (first, second)]
            factors = [rounded(widest, np.array([weight])) for weight in (0.3, 0.7)]
            terms = [rounded(widest, part * factor) for part, factor in zip(parts, factors, strict=True)]
            expected = tensor(widest, start + rounded(widest, terms[0] + terms[1]))
            assert np.array_equal(out.bits(name), expected.bits), (folder, name)
        assert [sorted(shard.tensors) for shard in out.shards] == [sorted(shard.tensors) for shard in base.shards]
    if shards == 2:
        written = json.loads((tmp_path / "out" / INDEX).read_bytes())
        assert set(written["weight_map"].values()) == {
            shard.path.name for shard in ModelFolder(tmp_path / "out").shards
        }


def test_a_vector_that_narrows_needs_its_base_to_be_merged(tmp_path: Path) -> None:
    base, first = model(tmp_path / "base", 0, "F32"), model(tmp_path / "first", 10, "BF16")
    vector = diff(base, first)
    with pytest.raises(MergeError, match=r"tensor 'layers.0.w' is BF16 \[6, 5\] but is F32 \[6, 5\] in the base"):
        merge([vector], "linear")
    merged = merge([vector], "linear", base=base)
    assert np.array_equal(merged["norm"].values, (read(first, "norm") - read(base, "norm"))[merged["norm"].indices])


def test_widened_vectors_add_up_and_apply(tmp_path: Path) -> None:
    base, first = model(tmp_path / "base", 0, "BF16"), model(tmp_path / "first", 10, "F32")
    diff(base, first).save(tmp_path / "a.lota")
    vector = TaskVector.open(tmp_path / "a.lota")
    (0.5 * vector + 0.5 * vector).save(tmp_path / "b.lota")
    apply(TaskVector.open(tmp_path / "b.lota"), base, tmp_path / "out")
    out = ModelFolder(tmp_path / "out")
    assert names_of(out) == {"F32"}
    assert np.allclose(read(out, "norm"), read(first, "norm"), rtol=1e-6)


@pytest.mark.parametrize("own", ["BF16", "F16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_merge_is_rounded_once(own: str, dtype: str, tmp_path: Path) -> None:
    base, first, second = (model(tmp_path / f"{i}", i, own) for i in (0, 10, 20))
    merged = merge([diff(base, first), diff(base, second)], "linear", [0.3, 0.7])
    apply(merged, base, tmp_path / "out", output=Output(dtype=dtype))
    target = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    for name in ("layers.0.w", "norm"):
        dense = np.zeros(30, np.float32)
        dense[merged[name].indices] = merged[name].values
        expected = tensor(target, read(base, name) + dense)
        assert np.array_equal(ModelFolder(tmp_path / "out").bits(name), expected.bits)


def test_a_vector_that_knows_its_result_gives_it_in_any_dtype(tmp_path: Path) -> None:
    """base + delta in f32 need not be the tuned weight where it is not rounded to the tuned dtype."""
    base = write_checkpoint(tmp_path / "base", {"w": tensor("BF16", [1e-3, 2.0])})
    tuned = write_checkpoint(tmp_path / "tuned", {"w": tensor("BF16", [1000.0, 3.0])})
    apply(diff(base, tuned), base, tmp_path / "out", output=Output(dtype="float32"))
    assert read(ModelFolder(tmp_path / "out"), "w").tolist() == [1000.0, 3.0]


@pytest.mark.parametrize("asked", [None, "float32", "float16"])
@pytest.mark.parametrize(("dtype", "large"), [("F16", 6e4), ("BF16", 3e38), ("F32", 3e38)])
def test_a_sum_that_the_dtype_does_not_hold_is_refused(
    dtype: str, large: float, asked: str | None, tmp_path: Path
) -> None:
    base = write_checkpoint(tmp_path / "base", {"w": tensor(dtype, [large, np.inf, 1.0])})
    tuned = write_checkpoint(tmp_path / "tuned", {"w": tensor(dtype, [large * 1.08, np.inf, 2.0])})
    merged = merge([diff(base, tuned)], "linear", [3.0], base=base)
    if (dtype, asked) == ("F16", "float32"):
        apply(merged, base, tmp_path / "out", output=Output(dtype=asked))
        assert 70000 < read(ModelFolder(tmp_path / "out"), "w")[0] < 80000
        return
    with pytest.raises(DTypeError, match="tensor 'w'"):
        apply(merged, base, tmp_path / "out", output=Output(dtype=asked))
    assert not (tmp_path / "out").exists()


def test_an_average_is_that_of_the_models(tmp_path: Path) -> None:
    base, first = model(tmp_path / "base", 0, "F32"), model(tmp_path / "first", 10, "F32")
    asked = linear(tmp_path, [first, base, first], [0.5, 0.25, 2], f"base_model: {base.path}")
    merged_folder(asked, tmp_path / "out")
    merged(asked).save(tmp_path / "m.lota")
    apply(TaskVector.open(tmp_path / "m.lota"), base, tmp_path / "again")
    for folder in ("out", "again"):
        found = read(ModelFolder(tmp_path / folder), "norm").astype(np.float64)
        exact = (read(first, "norm").astype(np.float64) * 2.5 + read(base, "norm") * 0.25) / 2.75
        assert np.allclose(found, exact, rtol=3e-7, atol=0)
    with pytest.raises(MergeError, match=r"tensor 'layers.0.w': the weights add up to 0, so there is no average"):
        merged(linear(tmp_path, [first, base], [1, -1])).change("layers.0.w")


@pytest.mark.parametrize(
    ("weights", "dtypes", "message"),
    [
        ([1e39, 1], {}, "tensor 'w': the weights leave the range of f32"),
        ([1e39, -1e39], {}, "tensor 'w': the weights leave the range of f32"),
        ([1.5, 1.0], {}, "tensor 'w': the result leaves the range of F32"),
        ([1, 1], {"dtype": "float16"}, "tensor 'w' contains .*, which is beyond float16"),
        ([0.5, 0.5], {"dtype": "bfloat16", "out_dtype": "float16"}, "tensor 'w' contains .*, which is beyond float16"),
    ],
)
def test_an_average_that_no_number_holds_is_refused(
    weights: list[float], dtypes: dict[str, str], message: str, tmp_path: Path
) -> None:
    base = write_checkpoint(tmp_path / "base", {"w": tensor("F32", [1.0, 3e38])})
    tuned = write_checkpoint(tmp_path / "tuned", {"w": tensor("F32", [2.0, 3e38])})
    more = "".join(f"{name}: {dtype}\n" for name, dtype in dtypes.items())
    with pytest.raises((MergeError, DTypeError), match=message):
        merged_folder(linear(tmp_path, [tuned, base], weights, more), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtypes", [("F32", "F16"), ("F16", "F32"), ("BF16", "F16"), ("F32", "F32")])
def test_an_average_keeps_what_is_no_number(dtypes: tuple[str, str], tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"w": tensor(dtypes[0], [1, 2, np.inf, np.nan])})
    tuned = write_checkpoint(tmp_path / "tuned", {"w": tensor(dtypes[1], [np.nan, -np.inf, np.inf, np.nan])})
    found = merged_folder(linear(tmp_path, [base, tuned], [1, 1]), tmp_path / "out")
    assert str(read(found, "w")) == "[ nan -inf  inf  nan]"


@given(st.lists(st.floats(0.125, 2, width=32), min_size=1, max_size=4))
def test_an_average_of_equal_models_is_the_model(
    tmp_path_factory: pytest.TempPathFactory, weights: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("m")
    base = model(folder / "base", 0, "BF16")
    found = merged(linear(folder, [base] * len(weights), weights))
    # in f32 an average of equals is off by less than a rounding to BF16 leaves
    assert all(len(found.change(name).touched()) == 0 for name in found)


@pytest.mark.parametrize("how", ["base first", "base last", "no base", "files"])
def test_linear_averages_whole_models(how: str, tmp_path: Path) -> None:
    base, first, second = (model(tmp_path / name, i, "F32") for i, name in ((0, "base"), (10, "one"), (20, "two")))
    diff(base, first).save(tmp_path / "one.lota")
    one = "one.lota" if how == "files" else "one"
    text = (
        f"merge_method: linear\nmodels:\n- {{model: {tmp_path / one}, parameters: {{weight: 1}}}}\n"
        f"- {{model: {second.path}, parameters: {{weight: 2}}}}\n"
    )
    weights = {"one": 1.0, "two": 2.0}
    if how == "base first":
        text += f"- {{model: {base.path}, parameters: {{weight: 3}}}}\n"
    if how == "base last":
        text += "parameters: {weight: 3}\n"
    if how.startswith("base"):
        weights["base"] = 3.0
    if how != "no base":
        text += f"base_model: {base.path}\n"
    asked = recipe(tmp_path, text)
    start = Recipe.read(asked).open_start()
    assert start is not None
    assert start.path == (first if how == "no base" else base).path
    merged_folder(asked, tmp_path / "out")
    models = {"base": base, "one": first, "two": second}
    total = sum(read(models[name], "norm").astype(np.float64) * weight for name, weight in weights.items())
    found = read(ModelFolder(tmp_path / "out"), "norm")
    assert np.allclose(found, total / sum(weights.values()), rtol=1e-6, atol=1e-7)


def test_models_that_cannot_be_averaged_are_refused_by_tensor(tmp_path: Path) -> None:
    first = model(tmp_path / "first", 0, "F32")
    others = {
        "shape": ({"norm": tensor("F32", np.ones((5, 6)))}, r"'norm' is \[6, 5\] in .*first and \[5, 6\] in .*shape"),
        "more": ({"more": tensor("F32", np.ones(3))}, "more has tensor 'more', which first does not have"),
        "ids": ({"ids": tensor("I64", [1, 3])}, "'ids' is I64 and differs between .*first and .*ids"),
    }
    own = {name: tensor("F32", read(first, name).reshape(SHAPE)) for name in ("layers.0.w", "layers.1.w", "norm")}
    for name, (other, message) in others.items():
        write_checkpoint(tmp_path / name, own | {"ids": tensor("I64", [1, 2])} | other)
        asked = recipe(
            tmp_path, f"merge_method: linear\nmodels: [{{model: {first.path}}}, {{model: {tmp_path / name}}}]"
        )
        with pytest.raises(MergeError, match=message):
            merged(asked)
