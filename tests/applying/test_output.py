"""What a model folder is written as: shards of any size, another dtype, a card; and in several goes."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracle
from support.building import Tensor, contents, package, tensor, write_checkpoint
from support.models import perturb
from transformers import AutoModelForCausalLM, AutoTokenizer

from taskvec import Applied, Checkpoint, TaskVector, diff, merge
from taskvec.applying.apply import apply
from taskvec.applying.output import TARGETS, Output
from taskvec.applying.rounding import rounded
from taskvec.errors import DTypeError, ResumeError, UsageError
from taskvec.merging.tokenizers import compare_tokenizers
from taskvec.vectors.vector import vector_of
from taskvec_formats import Form, ModelFolder, forms
from taskvec_formats.dtypes import DTYPES, DType
from taskvec_formats.errors import CheckpointError
from taskvec_formats.file_names import INDEX

pytestmark = pytest.mark.slow

FLOATS = [name for name, dtype in DTYPES.items() if dtype.additive]
CONFIG = {"architectures": ["Some"], "dtype": "float32", "rope": {"theta": 1e4, "limit": math.inf}, "names": ["ö"]}
FILES = {"config.json": json.dumps(CONFIG).encode(), "README.md": b"of the base", "tokenizer.json": b"{}"}


def noise(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape)


# a floating tensor of each usual dtype, some that are not, in an order that is not that of the names
MODEL = {
    "layers.1.weight": tensor("BF16", noise(0, 9, 7)),
    "embed.weight": tensor("F32", noise(1, 12, 6)),
    "bytes": tensor("U8", np.arange(3)),
    "layers.0.weight": tensor("F16", noise(2, 7, 5)),
    "norm.weight": tensor("F64", noise(3, 6)),
    "mask": tensor("BOOL", [1, 0, 1]),
    "scale": tensor("F32", 1.5),
    "unused": tensor("F32", np.zeros((0, 4))),
    "position_ids": tensor("I64", np.arange(9)),
}


def make_merge(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> tuple[Checkpoint, TaskVector]:
    """A base, and the merge of two fine-tunes of its floating tensors."""
    base = write_checkpoint(folder / "base", tensors, shards, FILES)
    for seed, name in enumerate(("first", "second")):
        moved = {}
        for key, each in tensors.items():
            values = each.bits.view(each.dtype.real) if each.dtype.additive else each.bits
            step = noise(50 + seed, len(values)) * 0.01 if each.dtype.additive else 0
            moved[key] = tensor(each.dtype.name, (values.astype(np.float64) + step).reshape(each.shape))
        diff(base, write_checkpoint(folder / name, moved, 1, FILES)).save(folder / f"{name}.lota")
    return base, the_merge(folder)


def the_merge(folder: Path) -> TaskVector:
    return merge([TaskVector.open(folder / f"{name}.lota") for name in ("first", "second")], "linear", [1, 0.5])


# shards


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, Tensor]:
    """Some tensors of any dtype and small shape."""
    tensors = {}
    for name in draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8, unique=True)):
        dtype, shape = draw(st.sampled_from(list(DTYPES.values()))), draw(oracle.shapes())
        tensors[name] = Tensor(dtype, shape, draw(oracle.carriers(dtype, math.prod(shape))))
    return tensors


@given(tensors=checkpoints(), shards=st.integers(1, 3), size=st.integers(1, 300))
def test_any_shard_size_gives_the_same_tensors(tensors: dict[str, Tensor], shards: int, size: int) -> None:
    with TemporaryDirectory() as folder:
        base = write_checkpoint(Path(folder, "base"), tensors, min(shards, len(tensors)), FILES)
        out = Path(folder, "out")
        assert apply(vector_of(base, {}, {}, {}), base, out, output=Output(shard_size=size)) == Applied(None)
        result = ModelFolder(out)
        assert contents(result) == contents(base)

        lengths = {name: info.stop - info.start for name, info in base.tensors.items()}
        expected: list[list[str]] = [[]]
        for name in (name for shard in base.shards for name in shard.tensors):
            if expected[-1] and sum(lengths[other] for other in expected[-1]) + lengths[name] > size:
                expected.append([])
            expected[-1].append(name)
        assert [sorted(shard.tensors) for shard in result.shards] == [sorted(part) for part in expected]
        for shard in result.shards:
            assert sum(lengths[name] for name in shard.tensors) <= size or len(shard.tensors) == 1
            assert shard.metadata == {"format": "pt"}
            assert all(info.start % info.dtype.itemsize == 0 for info in shard.tensors.values())

        names = [shard.path.name for shard in result.shards]
        if len(names) == 1:
            assert names == ["model.safetensors"]
            assert not (out / INDEX).exists()
        else:
            assert names == [f"model-{i + 1:05}-of-{len(names):05}.safetensors" for i in range(len(names))]
            index = json.loads((out / INDEX).read_bytes())
            assert index["metadata"] == {"total_size": sum(lengths.values())}
            places = {name: shard.path.name for shard in result.shards for name in shard.tensors}
            assert index["weight_map"] == places
        assert {name: (out / name).read_bytes() for name in FILES} == FILES


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_size", [None, 7000])
@pytest.mark.parametrize("base", ["llama", "llama_bf16"])
def test_transformers_loads_it_with_the_logits_of_a_dense_merge(
    base: str, shard_size: int | None, dtype: str | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint = ModelFolder(request.getfixturevalue(base))
    own = "float32" if base == "llama" else "bfloat16"
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        tuned = perturb(checkpoint.path, tmp_path / name, dtype=own, scale=1e-2 * (seed + 1))
        diff(checkpoint, ModelFolder(tuned), 0.7).save(tmp_path / f"{name}.lota")
    merged = the_merge(tmp_path)
    apply(merged, checkpoint, tmp_path / "out", output=Output(shard_size, dtype))

    dense = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=getattr(torch, own))
    dense.float()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name in merged:
                delta = np.zeros(parameter.numel(), np.float32)
                delta[merged[name].indices] = merged[name].values
                parameter.add_(torch.from_numpy(delta).reshape(parameter.shape))
    dense.to(getattr(torch, dtype or own)).save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.dtype == getattr(torch, dtype or own)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    # tied: stored once
    assert ModelFolder(tmp_path / "out").tensors.keys() == checkpoint.tensors.keys()
    assert "lm_head.weight" not in checkpoint.tensors
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("one plus two is", return_tensors="pt").input_ids
    assert torch.equal(found(tokens).logits, dense(tokens).logits)


def test_a_model_may_lose_all_its_tensors_to_shards_of_no_bytes(tmp_path: Path) -> None:
    base = write_checkpoint(
        tmp_path / "base", {"a": tensor("F32", np.zeros(0)), "b": tensor("I8", np.zeros((2, 0)))}, 2
    )
    apply(vector_of(base, {}, {}, {}), base, tmp_path / "out", output=Output(shard_size=1))
    assert contents(ModelFolder(tmp_path / "out")) == contents(base)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


# dtypes


def nearest(dtype: DType, number: float) -> float:
    """The number of `dtype` next to another, ties to the even one, ±inf beyond the largest; by exact fractions."""
    if number == 0 or not math.isfinite(number):
        return number
    assert dtype.mantissa is not None
    largest_exponent = (1 << 8 * dtype.itemsize - 2 - dtype.mantissa) - 1
    exponent = max(math.frexp(number)[1] - 1, 1 - largest_exponent)
    quantum = Fraction(2) ** (exponent - dtype.mantissa)
    found = round(Fraction(number) / quantum) * quantum
    if abs(found) >= Fraction(2) ** (largest_exponent + 1):
        return math.copysign(math.inf, number)
    return math.copysign(float(found), number)


def expected_bits(source: DType, target: DType, bits: list[int]) -> list[int] | None:
    """What carriers of one dtype become in another, one by one; None where a finite value would become infinite."""
    if source == target:
        return bits
    found = []
    for pattern in bits:
        number = oracle.value(source, pattern)
        rounded = nearest(target, nearest(DTYPES["F32"], number))
        if math.isfinite(number) and not math.isfinite(rounded):
            return None
        # the number is one of the target's, so that no conversion can round it; NaN loses sign and payload
        magnitude = math.nan if math.isnan(rounded) else abs(rounded)
        found.append(int(np.array([magnitude]).astype(target.real).view(target.carrier)[0]))
        if not math.isnan(rounded) and math.copysign(1, rounded) < 0:
            found[-1] |= 1 << 8 * target.itemsize - 1
    return found


def rounds_as_expected(source: str, dtype: str, patterns: Any) -> None:
    carriers = np.array(patterns, DTYPES[source].carrier)
    expected = expected_bits(DTYPES[source], DTYPES[TARGETS[dtype]], carriers.tolist())
    given_form = Form(DTYPES[source], (len(carriers),))
    if expected is None:
        with pytest.raises(DTypeError, match=rf"^tensor 'w' contains \S+, which is beyond {dtype}$"):
            rounded("w", carriers, given_form, Output(dtype=dtype))
    else:
        assert rounded("w", carriers, given_form, Output(dtype=dtype)).tolist() == expected


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("source", FLOATS)
@given(data=st.data())
def test_any_bits_are_rounded_as_a_naive_rounding_does(source: str, dtype: str, data: st.DataObject) -> None:
    rounds_as_expected(source, dtype, data.draw(oracle.carriers(DTYPES[source], data.draw(st.integers(0, 4)))))


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("source", [name for name in FLOATS if DTYPES[name].itemsize <= 2])
def test_patterns_of_a_short_dtype_are_rounded_as_a_naive_rounding_does(source: str, dtype: str) -> None:
    """Subnormals, both zeros, infinities and NaN of many payloads among them."""
    patterns = range(0, 1 << 8 * DTYPES[source].itemsize, 1 if DTYPES[source].itemsize == 1 else 7)
    fit = [p for p in patterns if expected_bits(DTYPES[source], DTYPES[TARGETS[dtype]], [p]) is not None]
    rounds_as_expected(source, dtype, fit)
    for pattern in sorted(set(patterns) - set(fit))[:: 1 << 8]:
        rounds_as_expected(source, dtype, [pattern])


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("source", ["F32", "F64"])
def test_what_lies_half_way_goes_to_the_even_neighbour(source: str, dtype: str) -> None:
    """At usual sizes, where numbers turn subnormal and among the smallest; and what lies a little to either side."""
    target = DTYPES[TARGETS[dtype]]
    assert target.mantissa is not None
    lowest = 2 - (1 << 8 * target.itemsize - 2 - target.mantissa)
    halves = []
    for exponent in (0, 5, lowest, lowest + 1):
        for step in (0, 1, 2, 3, (1 << target.mantissa) - 1):
            halves.append(math.ldexp(step + 0.5 + (1 << target.mantissa), exponent - target.mantissa))
            halves.append(math.ldexp(step + 0.5, lowest - target.mantissa))
    real = DTYPES[source].real
    with np.errstate(under="ignore"):
        values = np.array([sign * half for half in halves for sign in (1, -1)]).astype(real)
    values = np.concatenate([values, np.nextafter(values, real.type(np.inf)), np.nextafter(values, real.type(0))])
    rounds_as_expected(source, dtype, values.view(DTYPES[source].carrier))


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("shard_size", [None, 100])
@pytest.mark.parametrize("shards", [1, 3])
def test_floats_are_rounded_once_after_the_merge_and_nothing_else_is(
    shards: int, shard_size: int | None, dtype: str, tmp_path: Path
) -> None:
    base, merged = make_merge(tmp_path, MODEL, shards)
    apply(merged, base, tmp_path / "own")
    apply(merged, base, tmp_path / "out", output=Output(shard_size, dtype))
    target, out = DTYPES[TARGETS[dtype]], ModelFolder(tmp_path / "out")
    for name, (own, shape, bits) in contents(ModelFolder(tmp_path / "own")).items():
        source = DTYPES[own]
        if source.additive:
            # the sum in f32, or f64, and one rounding
            values = base.bits(name).view(source.real).astype(source.compute)
            if name in merged:
                values[merged[name].indices] += merged[name].values
            wide = DTYPES["F64" if own == "F64" else "F32"]
            patterns = values.view(wide.carrier).tolist()
            own, bits = target.name, np.array(expected_bits(wide, target, patterns), target.carrier).tobytes().hex()
        assert contents(out)[name] == (own, shape, bits), name
    assert out.tensors.keys() == base.tensors.keys()
    if shard_size is None:
        assert [sorted(shard.tensors) for shard in out.shards] == [sorted(shard.tensors) for shard in base.shards]
    if (tmp_path / "out" / INDEX).exists():
        index = json.loads((tmp_path / "out" / INDEX).read_bytes())
        assert index["metadata"]["total_size"] == sum(info.stop - info.start for info in out.tensors.values())
    assert json.loads((tmp_path / "out" / "config.json").read_bytes()) == {**CONFIG, "dtype": dtype}


def test_a_shard_without_floats_of_another_dtype_stays_to_the_byte(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {name: MODEL[name] for name in ("embed.weight", "bytes", "mask")}, 3)
    apply(vector_of(base, {}, {}, {}), base, tmp_path / "out", output=Output(dtype="bfloat16"))
    before, after = package(base.path), package(tmp_path / "out")
    same = {shard.path.name for shard in base.shards if before[shard.path.name] == after[shard.path.name]}
    assert same == {shard.path.name for shard in base.shards[1:]}


@pytest.mark.parametrize("output", [Output(), Output(dtype="bfloat16"), Output(2000, "float32"), Output(2000)])
def test_neither_blocks_nor_threads_show_in_what_is_written(
    output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {**MODEL, "wide": tensor("F32", noise(8, 3, 500)), "long": tensor("BF16", noise(9, 999))}
    base, merged = make_merge(tmp_path, tensors, 2)
    apply(merged, base, tmp_path / "whole", output=output)
    monkeypatch.setattr(forms, "BLOCK_ELEMENTS", 64)
    for name in ("first", "second"):
        diff(base, ModelFolder(tmp_path / name)).save(tmp_path / f"{name}.lota", force=True)
    assert len(TaskVector.open(tmp_path / "first.lota").specs["long"].blocks) > 10
    for threads in "1", "2", "5":
        monkeypatch.setenv("TASKVEC_THREADS", threads)
        apply(the_merge(tmp_path), base, tmp_path / threads, output=output)
        assert package(tmp_path / threads) == package(tmp_path / "whole")


def test_a_tensor_is_rounded_a_few_blocks_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "BLOCK_ELEMENTS", 1 << 14)
    monkeypatch.setenv("TASKVEC_THREADS", "2")
    base = write_checkpoint(tmp_path / "base", {"w": tensor("F32", noise(0, 1 << 21)), "v": tensor("F32", noise(1, 8))})
    vector = vector_of(base, {}, {}, {})
    tracemalloc.start()
    try:
        apply(vector, base, tmp_path / "out", output=Output(dtype="bfloat16"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 1 << 22
    assert peak < 1 << 21


@pytest.mark.parametrize(
    ("source", "value", "dtype"),
    [("F32", 70000, "float16"), ("BF16", -1e38, "float16"), ("F64", 1e300, "float32"), ("F64", -1e39, "bfloat16")],
)
def test_a_value_beyond_the_dtype_is_refused_and_leaves_nothing(
    source: str, value: float, dtype: str, tmp_path: Path
) -> None:
    base = write_checkpoint(
        tmp_path / "base", {"fits": tensor(source, [1, np.inf]), "large": tensor(source, [1, value])}, 2, FILES
    )
    vector = vector_of(base, {}, {}, {})
    with pytest.raises(DTypeError, match=rf"^tensor 'large' contains -?\S+e\+?\d+, which is beyond {dtype}$|70000"):
        apply(vector, base, tmp_path / "out", output=Output(dtype=dtype))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


CONFIGS = {
    "one key": ({"dtype": "float32", "a": 1}, {"dtype": "float16", "a": 1}),
    "the older key": ({"a": 1, "torch_dtype": "float32"}, {"a": 1, "torch_dtype": "float16"}),
    "both": ({"dtype": "float32", "torch_dtype": None}, {"dtype": "float16", "torch_dtype": "float16"}),
    "none": ({"a": [1, {"dtype": "float32"}]}, {"a": [1, {"dtype": "float32"}], "dtype": "float16"}),
    "not quantised": ({"quantization_config": None}, {"quantization_config": None, "dtype": "float16"}),
}


@pytest.mark.parametrize(("before", "after"), CONFIGS.values(), ids=CONFIGS.keys())
def test_the_config_says_the_dtype(before: Any, after: Any, tmp_path: Path) -> None:
    files = {**FILES, "config.json": json.dumps(before).encode()}
    base = write_checkpoint(tmp_path / "base", {"w": tensor("F32", [1, 2])}, 1, files)
    apply(vector_of(base, {}, {}, {}), base, tmp_path / "out", output=Output(dtype="float16"))
    found = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert (found, list(found)) == (after, list(after))


def test_a_lone_file_has_no_config(tmp_path: Path) -> None:
    base = ModelFolder(write_checkpoint(tmp_path / "base", {"w": tensor("F32", [1, 2])}).shards[0].path)
    apply(vector_of(base, {}, {}, {}), base, tmp_path / "out", output=Output(dtype="float16"))
    assert contents(ModelFolder(tmp_path / "out")) == {"w": ("F16", (2,), "003c0040")}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (b'{"quantization_config": {"quant_method": "fp8"}}', UsageError, r"^base is quantised \(config.json has a"),
        (b"{", CheckpointError, "^base: config.json is not valid JSON"),
        (b"[1]", CheckpointError, r"^base: config.json should be an object, found \[1\]"),
    ],
)
def test_a_config_that_does_not_allow_another_dtype(
    config: bytes, error: type[Exception], message: str, tmp_path: Path
) -> None:
    base = write_checkpoint(tmp_path / "base", MODEL, 1, {"config.json": config})
    vector = vector_of(base, {}, {}, {})
    with pytest.raises(error, match=message):
        apply(vector, base, tmp_path / "out", output=Output(dtype="bfloat16"), work=tmp_path / "out.part")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    apply(vector, base, tmp_path / "out", output=Output(shard_size=100))
    assert (tmp_path / "out" / "config.json").read_bytes() == config


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(UsageError, match="`dtype` is one of float32, bfloat16, float16, found 'float8'"):
        Output(dtype="float8")
    with pytest.raises(UsageError, match="a shard needs a size of at least 1 byte, found 0"):
        Output(shard_size=0)


# cards, and vectors that know their result


def test_a_card_takes_the_place_of_that_of_the_base(tmp_path: Path) -> None:
    base, merged = make_merge(tmp_path, MODEL, 2)
    apply(merged, base, tmp_path / "plain")
    apply(merged, base, tmp_path / "out", output=Output(card="# Merged, größer\n"))
    expected = package(tmp_path / "plain")
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "# Merged, größer\n"
    assert package(tmp_path / "out").keys() == expected.keys()
    assert {n for n, digest in package(tmp_path / "out").items() if digest != expected[n]} == {"README.md"}


def test_what_all_vectors_changed_alike_is_carried(tmp_path: Path) -> None:
    config = {"dtype": "float32", "more": 1}
    tuned = {**FILES, "config.json": json.dumps(config).encode(), "chat_template.jinja": b"new"}
    base = write_checkpoint(tmp_path / "base", {"w": tensor("F32", [1, 2])}, 1, FILES)
    pair = [
        diff(base, write_checkpoint(tmp_path / name, {"w": tensor("F32", weights)}, 1, tuned))
        for name, weights in (("first", [2, 2]), ("second", [1, 3]))
    ]
    carried = compare_tokenizers(pair, base).carried
    apply(merge(pair), base, tmp_path / "out", output=Output(dtype="float16", carried=tuple(carried)))
    assert contents(ModelFolder(tmp_path / "out")) == {"w": ("F16", (2,), "00400042")}
    assert json.loads((tmp_path / "out" / "config.json").read_bytes()) == {**config, "dtype": "float16"}
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == b"new"
    assert (tmp_path / "out" / "README.md").read_bytes() == FILES["README.md"]


ANEW = "{} is rewritten".format
OTHERWISE: dict[str, tuple[Output, list[str]]] = {
    "as it is": (Output(), []),
    "in its own dtype": (Output(dtype="float32"), []),
    "one shard": (Output(shard_size=10**6), [ANEW("model.safetensors")]),
    "rounded": (
        Output(dtype="bfloat16"),
        [*(ANEW(f"model-0000{i}-of-00002.safetensors") for i in (1, 2)), ANEW("config.json"), ANEW(INDEX)],
    ),
    "with a card": (Output(card=""), [ANEW("README.md")]),
}


@pytest.mark.parametrize(("output", "differences"), OTHERWISE.values(), ids=OTHERWISE.keys())
def test_what_is_written_otherwise_is_not_the_tuned_checkpoint(
    output: Output, differences: list[str], tmp_path: Path
) -> None:
    config = json.dumps({"dtype": "float32"}, indent=2).encode() + b"\n"
    files = {"config.json": config, "README.md": b"of the base"}
    weights = {name: tensor("F32", noise(seed, 4, 3)) for seed, name in enumerate("abcd")}
    base = write_checkpoint(tmp_path / "base", weights, 1, files)
    tuned = write_checkpoint(tmp_path / "tuned", {**weights, "a": tensor("F32", noise(9, 4, 3))}, 2, files)
    if output.dtype == "float32":
        # as this library writes an index
        sizes = {"metadata": {"total_size": 4 * 48}, "weight_map": {n: tuned._owners[n].path.name for n in "abcd"}}
        (tuned.path / INDEX).write_text(json.dumps(sizes, indent=2) + "\n")
        tuned = ModelFolder(tuned.path)
    applied = apply(diff(base, tuned), base, tmp_path / "out", output=output)
    assert applied == Applied(not differences, tuple(differences))
    assert (package(tmp_path / "out") == package(tuned.path)) == applied.exact


def test_weights_that_are_not_the_base_s_are_named_in_other_shards_too(tmp_path: Path) -> None:
    weights = {name: tensor("F32", noise(seed, 4, 3)) for seed, name in enumerate("abcd")}
    base = write_checkpoint(tmp_path / "base", weights)
    other = write_checkpoint(tmp_path / "other", {**weights, "b": tensor("F32", noise(8, 4, 3))})
    tuned = write_checkpoint(tmp_path / "tuned", {**weights, "a": tensor("F32", noise(9, 4, 3))})
    diff(base, tuned).save(tmp_path / "a.lota")
    applied = apply(TaskVector.open(tmp_path / "a.lota"), other, tmp_path / "out", output=Output(shard_size=50))
    assert applied.exact is False
    assert applied.differences[0] == "weights that the vector does not change differ from its base"
    shards = [shard.path.name for shard in ModelFolder(tmp_path / "out").shards]
    assert applied.differences[1:] == tuple(map(ANEW, [*shards, INDEX]))


def test_a_vector_that_knows_its_result_is_written_at_one_go(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", MODEL)
    tuned = write_checkpoint(tmp_path / "tuned", {**MODEL, "scale": tensor("F32", 2.5)})
    with pytest.raises(UsageError, match="is known and compared as a whole: it cannot be resumed"):
        apply(diff(base, tuned), base, tmp_path / "out", work=tmp_path / "out.part")
    assert not (tmp_path / "out.part").exists()


# several goes


PROGRAM = """
import os, resource, signal, sys
from pathlib import Path
from taskvec import TaskVector, merge
from taskvec_formats import ModelFolder
from taskvec.applying.apply import apply
from taskvec.applying.output import Output

folder, last = Path(sys.argv[1]), int(sys.argv[2])

def progress(stage, done, total, note):
    if stage == "applying" and note and done == last:
        exec(sys.argv[3])

vectors = [TaskVector.open(folder / f"{name}.lota") for name in ("first", "second")]
merged = merge(vectors, "linear", [1, 0.5])
output = Output(100, "bfloat16", "a card")
record = {"vectors": ["first", "second"], "weights": [1, 0.5]}
base, out = ModelFolder(folder / "base"), folder / "out"
apply(merged, base, out, progress, output, force=True, work=folder / "out.part", record=record)
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
# a limit on the size of a file stands in for the disk
FULL = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"
GOES = Output(100, "bfloat16", "a card")
COUNTS = [1, 4, 1, 3]
ENDS = [1, 5, 6, 9]
RECORD = {"vectors": ["first", "second"], "weights": [1, 0.5]}


def disturbed(folder: Path, step: int, how: str) -> subprocess.CompletedProcess[bytes]:
    """PROGRAM, to which something happens when so many tensors are written."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(step), how], capture_output=True, check=False
    )


def go(folder: Path, output: Output = GOES, record: dict[str, Any] = RECORD, **more: Any) -> Applied:
    """What PROGRAM does when nothing kills it."""
    base, out = ModelFolder(folder / "base"), folder / "out"
    return apply(the_merge(folder), base, out, output=output, work=folder / "out.part", record=record, **more)


class StopError(Exception):
    """Raised in the middle."""


def stopping(step: int) -> Callable[[str, int, int, str], None]:
    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage == "applying" and note and done == step:
            raise StopError

    return progress


def shards_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every finished shard."""
    found = {path.name: path.stat() for path in folder.glob("*.safetensors")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


@pytest.fixture
def merging(tmp_path: Path) -> Path:
    """A folder with a base, two vectors, and the merge of GOES as it is when nothing interrupts it."""
    make_merge(tmp_path, MODEL, 2)
    base = ModelFolder(tmp_path / "base")
    apply(the_merge(tmp_path), base, tmp_path / "whole", output=GOES)
    assert [len(shard.tensors) for shard in ModelFolder(tmp_path / "whole").shards] == COUNTS
    return tmp_path


@pytest.mark.parametrize(("last", "old"), [(1, False), (2, False), (5, True), (6, False), (9, True)], ids=str)
def test_a_merge_that_was_killed_goes_on_to_the_same_bytes(last: int, old: bool, merging: Path) -> None:
    work, out = merging / "out.part", merging / "out"
    if old:
        write_checkpoint(out, {"old": tensor("F32", [1])}, 1, {"more.json": b"1"})
    before = package(out) if old else {}
    died = disturbed(merging, last, KILL)
    assert (died.returncode, died.stderr) == (-signal.SIGKILL, b"")
    finished = shards_of(work)
    assert len(finished) == sum(end < last for end in ENDS)
    # what it was writing is there under another name
    assert [path.name for path in work.glob(".*.part")]
    assert (package(out) if out.exists() else {}) == before

    assert go(merging, force=old) == Applied(None)
    assert package(out) == package(merging / "whole")
    assert finished.items() <= shards_of(out).items()
    assert not work.exists()
    assert not list(merging.glob(".*"))


@pytest.mark.parametrize("step", range(1, 10))
def test_an_exception_keeps_what_is_finished_and_nothing_else(step: int, merging: Path) -> None:
    with pytest.raises(StopError):
        go(merging, progress=stopping(step))
    complete = sum(end < step for end in ENDS)
    names = [f"model-0000{i + 1}-of-00004.safetensors" for i in range(complete)]
    assert not (merging / "out").exists()
    assert (merging / "out.part").exists() == bool(complete)
    if complete:
        assert sorted(path.name for path in (merging / "out.part").iterdir()) == [*names, "run.json"]
    go(merging)
    assert package(merging / "out") == package(merging / "whole")


def test_several_interruptions_in_a_row(merging: Path) -> None:
    for end in ENDS[:-1]:
        with pytest.raises(StopError):
            go(merging, progress=stopping(end + 1))
    seen: list[int] = []
    go(merging, progress=lambda stage, done, total, note: seen.append(done) if stage == "applying" and note else None)
    assert seen == list(range(10))
    assert package(merging / "out") == package(merging / "whole")


@pytest.mark.parametrize("left", [[], ["model-00002-of-00004.safetensors"]], ids=["no shard", "one"])
def test_a_kill_among_the_last_renames_costs_only_what_was_renamed(left: list[str], merging: Path) -> None:
    """Finished shards leave the folder one by one, and the record goes last."""
    work, out = merging / "out.part", merging / "out"
    with pytest.raises(StopError):
        go(merging, progress=stopping(9))
    record = (work / "run.json").read_bytes()
    go(merging)
    work.mkdir()
    (work / "run.json").write_bytes(record)
    for name in left:
        (out / name).rename(work / name)
    finished = shards_of(work)
    go(merging, force=True)
    assert package(out) == package(merging / "whole")
    assert finished.items() <= shards_of(out).items()
    assert not work.exists()


def test_without_a_folder_to_go_on_in_nothing_is_left(merging: Path) -> None:
    before = sorted(path.name for path in merging.iterdir())
    with pytest.raises(StopError):
        apply(the_merge(merging), ModelFolder(merging / "base"), merging / "out", stopping(8), GOES)
    assert sorted(path.name for path in merging.iterdir()) == before


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"output": Output(100, "float16")}, r"output\.dtype is bfloat16 there, but float16 here"),
    "no dtype": ({"output": Output(100)}, r"output\.dtype is bfloat16 there, but None here"),
    "shard size": ({"output": Output(101, "bfloat16")}, r"output\.shard_size is 100 there, but 101 here"),
    "weights": ({"record": {**RECORD, "weights": [1, 1]}}, r"weights is \[1, 0.5\] there, but \[1, 1\] here"),
    "more": ({"record": {**RECORD, "method": "ties"}}, "method is None there, but ties here"),
}


@pytest.mark.parametrize(("other", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_the_folder_of_another_merge_is_refused_by_name(other: dict[str, Any], message: str, merging: Path) -> None:
    with pytest.raises(StopError):
        go(merging, progress=stopping(9))
    before = shards_of(merging / "out.part")
    with pytest.raises(ResumeError, match=rf"out\.part belongs to another merge: {message}$"):
        go(merging, **other)
    assert shards_of(merging / "out.part") == before
    # another card is not: it is written at the end
    go(merging, Output(100, "bfloat16", "another card"))
    expected = package(merging / "whole")
    assert {n for n, digest in package(merging / "out").items() if expected[n] != digest} == {"README.md"}


def test_another_base_is_refused_although_the_vectors_fit(merging: Path) -> None:
    with pytest.raises(StopError):
        go(merging, progress=stopping(9))
    base = write_checkpoint(merging / "other", {**MODEL, "bytes": tensor("U8", [9, 9, 9])}, 2, FILES)
    with pytest.raises(ResumeError, match=r"belongs to another merge: base is \w+ there, but \w+ here$"):
        apply(the_merge(merging), base, merging / "out", output=GOES, work=merging / "out.part", record=RECORD)


@pytest.mark.parametrize("damage", ["shorter", "longer", "another header"])
def test_a_shard_that_is_not_whole_is_written_anew(damage: str, merging: Path) -> None:
    with pytest.raises(StopError):
        go(merging, progress=stopping(9))
    work = merging / "out.part"
    first, *others = sorted(work.glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[20] ^= damage == "another header"
    first.write_bytes(content[:-1] if damage == "shorter" else content + b"x" * (damage == "longer"))
    kept = {path.name: shards_of(work)[path.name] for path in others}
    (work / "stray.safetensors").write_bytes(b"of somebody else")
    go(merging)
    assert package(merging / "out") == package(merging / "whole")
    assert kept.items() <= shards_of(merging / "out").items()


def test_files_without_a_record_are_no_shards_of_ours(merging: Path) -> None:
    work = merging / "out.part"
    work.mkdir()
    shard = next((merging / "whole").glob("*.safetensors"))
    (work / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(ResumeError, match=r"out\.part contains files, but no record of the run that they belong to"):
        go(merging)
    assert (work / shard.name).exists()
    (work / shard.name).unlink()
    (work / ".run.json.x1.part").write_bytes(b"{")
    go(merging)
    assert package(merging / "out") == package(merging / "whole")


def test_where_the_disk_is_full_the_finished_shards_wait(merging: Path) -> None:
    done = disturbed(merging, 1, FULL)
    assert done.returncode == 1
    path = merging / "out.part" / "model-00002-of-00004.safetensors"
    assert done.stderr.decode().splitlines()[-1] == f"OSError: [Errno 27] File too large: '{path}'"
    assert not (merging / "out").exists()
    finished = shards_of(merging / "out.part")
    assert list(finished) == ["model-00001-of-00004.safetensors"]
    go(merging)
    assert package(merging / "out") == package(merging / "whole")
    assert finished.items() <= shards_of(merging / "out").items()
