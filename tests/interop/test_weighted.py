"""Weighted sums of LoRA adapters are those of peft's add_weighted_adapter with combination_type="cat"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapters import make_adapter
from support.commands import inside, refused
from support.models import make_gpt2, make_llama
from transformers import AutoModelForCausalLM

import taskvec
from taskvec import TaskVector, interop
from taskvec.errors import AdapterError, UsageError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of peft, about models that it does not know
]
WEIGHTS = (0.7, -0.3)


def load(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_sum_is_that_of_peft(architecture: str, tmp_path: Path) -> None:
    base = (make_llama if architecture == "llama" else make_gpt2)(tmp_path / "base")
    targets = {"llama": (["q_proj", "v_proj"], ["q_proj", "embed_tokens"]), "gpt2": (["c_attn"], ["c_attn", "wpe"])}
    adapters = [
        make_adapter(
            base, tmp_path / str(rank), r=rank, lora_alpha=7, target_modules=own, fan_in_fan_out=architecture == "gpt2"
        )
        for rank, own in zip((4, 3), targets[architecture], strict=True)
    ]
    interop.from_peft(adapters, base, weights=WEIGHTS).save(tmp_path / "sum.lota")
    taskvec.apply(tmp_path / "sum.lota", base, tmp_path / "out")
    model = PeftModel.from_pretrained(load(base), adapters[0], adapter_name="one")
    model.load_adapter(adapters[1], adapter_name="two")
    model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "sum", combination_type="cat")
    model.set_adapter("sum")
    expected, found = model.merge_and_unload().state_dict(), load(tmp_path / "out").state_dict()
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        assert torch.allclose(found[name], values, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_sum_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", dtype=str(dtype).removeprefix("torch."))
    first = make_adapter(base, tmp_path / "first", dtype)
    second = make_adapter(base, tmp_path / "second", dtype, use_rslora=True, r=2, rank_pattern={"v_proj": 3})
    vector = interop.from_peft([first, second], base, weights=WEIGHTS)
    vector.save(tmp_path / "sum.lota")
    taskvec.apply(tmp_path / "sum.lota", base, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    changed = 0
    for name, values in before.items():
        delta = torch.zeros(values.shape, dtype=torch.float64)
        for weight, adapter in zip(WEIGHTS, (first, second), strict=True):
            tensors = load_file(adapter / "adapter_model.safetensors")
            start = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{start}A.weight" in tensors:
                a, b = tensors[f"{start}A.weight"].double(), tensors[f"{start}B.weight"].double()
                scaling = 8 / len(a) if adapter == first else 8 / len(a) ** 0.5
                delta += weight * scaling * (b @ a)
                changed += 1
        assert torch.equal(after[name], (values.float() + delta.float()).to(dtype)), name
    assert changed == 12
    assert [each["weight"] for each in vector.provenance["adapters"]] == list(WEIGHTS)


def test_adapters_of_both_layers_that_share_weights(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    output = make_adapter(base, tmp_path / "output", target_modules=["lm_head", "q_proj"])
    both = make_adapter(base, tmp_path / "both", target_modules=["lm_head", "embed_tokens"])
    for adapter in (output, both):
        alone, weighted = interop.from_peft(adapter, base), interop.from_peft(adapter, base, weights=[1])
        assert list(alone) == list(weighted)
        for name in alone:
            one, other = (vector.to_torch(name, dense=True) for vector in (alone, weighted))
            assert torch.allclose(one, other, atol=1e-6), name


def test_factors_of_an_embedding_are_not_rounded_with_the_base(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", dtype="bfloat16")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    vector = interop.from_peft(adapter, base, weights=[0.5])
    tensors = load_file(adapter / "adapter_model.safetensors")
    start = "base_model.model.model.embed_tokens.lora_embedding_"
    delta = (tensors[f"{start}B"].double() @ tensors[f"{start}A"].double()).T  # 0.5 * lora_alpha / r = 1
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    vector.save(tmp_path / "half.lota")
    taskvec.apply(tmp_path / "half.lota", base, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(after, (before.float() + delta.float()).bfloat16())


def test_weights_of_one_and_weights_that_are_left_out(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    alone, double = interop.from_peft(adapter, base), interop.from_peft([adapter, adapter], base)
    half = interop.from_peft(adapter, base, weights=[0.5], sparsity=0.5)
    for name in alone:
        one, two = (vector.to_torch(name, dense=True) for vector in (alone, double))
        assert torch.allclose(2 * one, two, atol=1e-6)
    assert sum(map(len, half.values())) == sum(half.specs[name].size for name in half) // 2
    with pytest.raises(UsageError, match="1 weights are given for 2 adapters"):
        interop.from_peft([adapter, adapter], base, weights=[1])
    with pytest.raises(UsageError, match="a weight must be a finite number, found nan"):
        interop.from_peft(adapter, base, weights=[float("nan")])
    with pytest.raises(UsageError, match="at least one adapter is needed"):
        interop.from_peft([], base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "has use_dora, so it has no weighted sum"),
        ({"modules_to_save": ["norm"]}, "has modules_to_save, so it has no weighted sum"),
        ({"bias": "lora_only"}, "has trained biases, so it has no weighted sum"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa', which also changes the base"),
        ({"trainable_token_indices": [3]}, "has trainable_token_indices, so it has no weighted sum"),
        (
            {"config": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])},
            "is of the kind IA3, and weights",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adapters_that_are_more_than_a_product_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = make_llama(tmp_path / "base")
    plain = make_adapter(base, tmp_path / "plain")
    other = options if "config" in options else {"config": peft.LoraConfig(r=4, target_modules=["q_proj"], **options)}
    adapter = make_adapter(base, tmp_path / "other", **other)
    with pytest.raises(AdapterError, match=f"other {message}.*: convert it by itself, and add the vectors"):
        interop.from_peft([plain, adapter], base, weights=WEIGHTS)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    plain = make_adapter(base, tmp_path / "plain")
    for damage, message in (("lacks", r"lacks tensor '.*lora_A\.weight'"), ("embedding", "has other values for")):
        targets = ["q_proj"] if damage == "lacks" else ["q_proj", "embed_tokens"]
        adapter = make_adapter(base, tmp_path / damage, target_modules=targets)
        tensors = load_file(adapter / "adapter_model.safetensors")
        if damage == "lacks":
            del tensors[min(tensors)]
        else:
            tensors[next(name for name in tensors if "lora" not in name)] += 1
        save_file(tensors, adapter / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=message):
            interop.from_peft([plain, adapter], base)


def test_the_command(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    first, second = make_adapter(base, tmp_path / "first"), make_adapter(base, tmp_path / "second", r=2)
    command = ["convert", first, second, "--base", base, "--weights", "0.7,-0.3", "-o", tmp_path / "sum.lota"]
    done = inside(*command, "--json")
    assert done.returncode == 0, done.stderr
    found, expected = TaskVector.open(tmp_path / "sum.lota"), interop.from_peft([first, second], base, weights=WEIGHTS)
    assert json.loads(done.stdout)["entries"] == sum(map(len, expected.values()))
    assert all(found[name].values.tobytes() == expected[name].values.tobytes() for name in expected)
    (patch := tmp_path / "x.wsp").touch()
    message = "several sources must all be adapters of peft"
    assert message in refused(2, "convert", patch, first, "--base", base, "-o", tmp_path / "x.lota")
