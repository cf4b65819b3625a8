"""Adapters of peft become the vectors that peft's own merge gives, and vectors become adapters that peft loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from support.adapters import make_adapter
from support.commands import inside, refused
from support.models import make_bert, make_gpt2, make_llama, make_mixtral
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import taskvec
from taskvec import TaskVector, interop
from taskvec.errors import AdapterError, BaseMismatchError, KindError, OutputExistsError, UsageError
from taskvec.interop.adapters import read_adapter, stored_tensors
from taskvec.interop.names import CONFIG, is_adapter
from taskvec_formats import ModelFolder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of peft, about models that it does not know
]
TASKVEC = [sys.executable, "-m", "taskvec_cli"]
WORDS = torch.arange(14).view(2, 7)

# name -> arguments of LoraConfig
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "norms": {"modules_to_save": ["norm"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "patterns": {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 2}},
}


def load(base: Path, dtype: torch.dtype, kind: Any = AutoModelForCausalLM) -> Any:
    return kind.from_pretrained(base, dtype=dtype)


def check_merge(base: Path, adapter: Path, folder: Path, dtype: torch.dtype, kind: Any = AutoModelForCausalLM) -> None:
    """Compare the result of the vector with the model that peft's merge gives."""
    merged = PeftModel.from_pretrained(load(base, dtype, kind), adapter).merge_and_unload()
    interop.from_peft(adapter, base).save(folder / "adapter.lota")
    taskvec.apply(folder / "adapter.lota", base, folder / "out")
    found = load(folder / "out", dtype, kind).state_dict()
    assert found.keys() == merged.state_dict().keys()
    for name, values in merged.state_dict().items():
        assert torch.equal(found[name], values), name
    written, before = ModelFolder(folder / "out"), ModelFolder(base)
    assert written.fingerprint != before.fingerprint
    assert {n: each.form for n, each in written.tensors.items()} == {n: each.form for n, each in before.tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_the_vector_of_a_lora_is_what_peft_merges(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", dtype=str(dtype).removeprefix("torch."))
    adapter = make_adapter(base, tmp_path / "adapter", dtype, **options)
    check_merge(base, adapter, tmp_path, dtype)


def test_other_architectures(tmp_path: Path) -> None:
    for name, make, kind, targets in (
        ("gpt2", make_gpt2, AutoModelForCausalLM, ["c_attn"]),
        ("bert", make_bert, AutoModelForMaskedLM, ["query"]),
        ("mixtral", make_mixtral, AutoModelForCausalLM, ["q_proj"]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        base = make(folder / "base")
        transposed = name == "gpt2"
        adapter = make_adapter(base, folder / "a", kind=kind, target_modules=targets, fan_in_fan_out=transposed)
        check_merge(base, adapter, folder, torch.float32, kind)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=4, target_modules=["q_proj"]),
        peft.LoKrConfig(r=4, target_modules=["q_proj"]),
        peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
        peft.VeraConfig(r=4, target_modules=["q_proj"]),
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        peft.LNTuningConfig(target_modules=["norm"]),
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
        LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_kinds_of_adapters(config: Any, tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    check_merge(base, make_adapter(base, tmp_path / "adapter", config=config), tmp_path, torch.float32)


def test_a_prompt_is_no_change_of_weights(base: Path, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    prompt = make_adapter(base, tmp_path / "prompt", config=config)
    with pytest.raises(AdapterError, match="is of the kind PROMPT_TUNING, which does not change weights"):
        interop.from_peft(prompt, base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication, and the base has no tensors for the layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', whose decomposition of the base is random"),
    ],
)
def test_effects_that_an_adapter_does_not_determine_are_refused(
    base: Path, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], **options)
    make_adapter(base, tmp_path / "adapter", config=config)
    with pytest.raises(AdapterError, match=message):
        interop.from_peft(tmp_path / "adapter", base)


def test_a_base_of_several_dtypes_keeps_them(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", dtype="bfloat16")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float() + 1e-4  # not a number of bf16
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", torch.float32)
    vector = interop.from_peft(adapter, base)
    assert {name.split(".")[-2] for name in vector} == {"q_proj", "v_proj", "down_proj"}
    merged = PeftModel.from_pretrained(load(base, torch.float32), adapter).merge_and_unload().state_dict()
    vector.save(tmp_path / "adapter.lota")
    taskvec.apply(tmp_path / "adapter.lota", base, tmp_path / "out")
    for name, found in load_file(tmp_path / "out" / "model.safetensors").items():
        assert found.dtype == weights[name].dtype
        assert torch.equal(found, merged[name].to(found.dtype))


def test_a_sparsity_keeps_the_largest_changes(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    whole, sparse = interop.from_peft(adapter, base), interop.from_peft(adapter, base, 0.9)
    kept = np.concatenate([np.abs(sparse[name].values) for name in sparse])
    every = np.concatenate([np.abs(whole[name].values) for name in whole])
    assert len(kept) == round(0.1 * every.size)
    assert kept.min() >= np.sort(every)[-len(kept)]
    assert sparse.provenance["adapter"] == {
        "lora_alpha": 8,
        "peft_type": "LORA",
        "r": 4,
        "use_dora": False,
        "use_rslora": False,
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(base, tmp_path / "adapter")


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_an_adapter_that_separates_shared_weights_is_refused(base: Path, module: str, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "separate", modules_to_save=[module])
    with pytest.raises(AdapterError, match=r"lm_head\.weight differs from the layer that it shares its weights with"):
        interop.from_peft(adapter, base)


def without_a_tensor(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, adapter / "adapter_model.safetensors")


def with_another_tensor(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)
    save_file(tensors, adapter / "adapter_model.safetensors")


def as_pickle(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def cut(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"short")


def no_kind(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{}")


def no_json(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")


def no_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


def other_layers(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["w1"]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_tensor, r"lacks tensor 'base_model\.model\..*', which its configuration requires"),
        (with_another_tensor, r"tensor '.*layers\.7.*' belongs to no layer of this base"),
        (as_pickle, r"has no adapter_model\.safetensors; adapter_model\.bin is a pickle, which can run code"),
        (cut, r"adapter_model\.safetensors is not a safetensors file"),
        (no_kind, "it has no peft_type"),
        (no_json, "is not JSON"),
        (no_config, r"adapter_config\.json cannot be read"),
        (other_layers, "peft cannot merge .* into this base"),
    ],
)
def test_a_damaged_adapter_is_refused(base: Path, adapter: Path, damage: Any, message: str) -> None:
    damage(adapter)
    with pytest.raises(AdapterError, match=message):
        interop.from_peft(adapter, base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "this"}, "peft imports a module that the file names"),
        ({"rank_pattern": {"((": 3}}, "peft cannot merge .* into this base: missing \\)"),
        ({"trainable_token_indices": [99999]}, "peft cannot merge .* into this base: index 99999 is out of bounds"),
        ({"r": 3}, r"peft cannot merge .* into this base: Error\(s\) in loading .*: size mismatch for"),
        ({"lora_alpha": float("nan")}, r"adapter_config\.json is not JSON"),
    ],
)
def test_settings_that_are_not_valid_are_refused(
    base: Path, adapter: Path, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "changed")
    config = tmp_path / "changed" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(AdapterError, match=message):
        interop.from_peft(tmp_path / "changed", base)


def test_weights_beyond_the_range_of_their_dtype_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "changed")
    config = tmp_path / "changed" / CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 1e45}))
    for weights in (None, [1.0]):
        with pytest.raises(AdapterError, match=r"^with the adapter, [\d,]+ weights of tensor '.*' are beyond"):
            interop.from_peft([tmp_path / "changed"], base, weights=weights).save(tmp_path / "x.lota")
        assert not (tmp_path / "x.lota").exists()


def test_a_value_that_is_not_finite_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "changed")
    path = tmp_path / "changed" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    for weights in (None, [0.5]):
        with pytest.raises(AdapterError, match=r"tensor '.*' has a value that is not a finite number"):
            interop.from_peft(tmp_path / "changed", base, weights=weights)


def test_values_of_fp8_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    for value in (1.0, float("nan")):
        save_file({"a": torch.full((2,), value).to(torch.float8_e4m3fn)}, path)
        if value == 1:
            assert list(stored_tensors(tmp_path)) == ["a"]
        else:
            with pytest.raises(AdapterError, match="tensor 'a' has a value that is not a finite number"):
                stored_tensors(tmp_path)


def test_a_quantised_base_is_refused(base: Path, adapter: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(
        AdapterError,
        match=r"base is quantised \(fp8, says its config\.json\): use the model that it was quantised from",
    ):
        interop.from_peft(adapter, base)


def test_an_adapter_of_another_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = make_mixtral(tmp_path / "mixtral")
    with pytest.raises(AdapterError, match=r"peft cannot merge|belongs to no layer|lacks tensor"):
        interop.from_peft(adapter, other)


def fine_tuned(base: Path, folder: Path, dtype: torch.dtype, density: float = 0.1) -> Any:
    """Change some weights of the linear layers, and write the model."""
    model = load(base, dtype)
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter[torch.rand(parameter.shape, generator=dice) < density] += 0.05
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_peft_computes_with_an_exported_vector(dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", dtype=str(dtype).removeprefix("torch."))
    tuned = fine_tuned(base, tmp_path / "tuned", dtype)
    vector = taskvec.pack(base, tmp_path / "tuned", tmp_path / "tuned.lota")
    written = interop.to_shira(tmp_path / "tuned.lota", base, tmp_path / "shira")
    assert written.entries == sum(len(vector[name]) for name in vector)
    model = PeftModel.from_pretrained(load(base, dtype), written.path)
    assert torch.equal(model(WORDS).logits, tuned(WORDS).logits)
    assert sum(parameter.numel() for name, parameter in model.named_parameters() if "shira_weight" in name) == (
        written.entries + written.padding
    )
    back = interop.from_peft(written.path, base)
    assert list(back) == list(vector)
    for name in vector:
        assert np.array_equal(back[name].indices, vector[name].indices)
        assert np.array_equal(back[name].values, vector[name].values)


def test_what_shira_cannot_hold_is_refused(base: Path, tmp_path: Path) -> None:
    fine_tuned(base, tmp_path / "tuned", torch.float32)
    vector = taskvec.pack(base, tmp_path / "tuned", tmp_path / "tuned.lota")
    patch = taskvec.pack(base, tmp_path / "tuned", tmp_path / "patch.lota", kind="patch")
    with pytest.raises(KindError, match="is a patch, which has no deltas"):
        interop.to_shira(patch, base, tmp_path / "shira")
    with pytest.raises(BaseMismatchError, match="was taken from base, not from other"):
        interop.to_shira(vector, make_llama(tmp_path / "other", seed=1), tmp_path / "shira")
    dense = taskvec.diff(base, fine_tuned(base, tmp_path / "dense", torch.float32, 0.9))
    with pytest.raises(AdapterError, match=r"needs r = \d+, but tensor '.*' of \d+ × \d+ weights allows r = \d+ at"):
        interop.to_shira(dense, base, tmp_path / "shira")
    model = load(base, torch.float32)
    with torch.no_grad():
        model.model.norm.weight += 1
    with pytest.raises(AdapterError, match=r"tensor 'model\.norm\.weight' is not the weight of a linear layer"):
        interop.to_shira(taskvec.diff(base, model), base, tmp_path / "shira")
    with pytest.raises(AdapterError, match="has no entries"):
        interop.to_shira(vector - vector, base, tmp_path / "shira")
    assert not (tmp_path / "shira").exists()
    interop.to_shira(vector, base, tmp_path / "shira")
    with pytest.raises(OutputExistsError):
        interop.to_shira(vector, base, tmp_path / "shira")
    interop.to_shira(vector, base, tmp_path / "shira", force=True)


def test_the_vector_of_an_adapter_protects_its_folder(base: Path, adapter: Path) -> None:
    for vector in (interop.from_peft(adapter, base), read_adapter(adapter, ModelFolder(base))):
        with pytest.raises(UsageError, match="is an input"):
            vector.save(adapter / "adapter_model.safetensors", force=True)
        with pytest.raises(UsageError, match="is an input"):
            taskvec.apply(vector, base, adapter, force=True)


def test_a_model_beside_an_adapter_is_a_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    fine_tuned(base, tmp_path / "tuned", torch.float32)
    assert is_adapter(adapter)
    for file in adapter.iterdir():
        (tmp_path / "tuned" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tuned" / "adapter_model.safetensors").unlink()
    assert not is_adapter(tmp_path / "tuned")
    assert not is_adapter(base)


def run(*arguments: object) -> str:
    done = inside(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_take_adapters(base: Path, adapter: Path, tmp_path: Path) -> None:
    run("convert", adapter, "--base", base, "-o", tmp_path / "a.lota")
    run("pack", base, adapter, "-o", tmp_path / "b.lota")
    assert (tmp_path / "a.lota").read_bytes() == (tmp_path / "b.lota").read_bytes()
    second = make_adapter(base, tmp_path / "second", use_rslora=True, r=2)
    merged = ["merge", adapter, second, "--base", base, "--weights", "0.5,0.5", "--method", "linear"]
    run(*merged, "-o", tmp_path / "merged")
    run("convert", second, "--base", base, "-o", tmp_path / "second.lota")
    expected = taskvec.merge([tmp_path / "a.lota", tmp_path / "second.lota"], "linear", [0.5, 0.5])
    taskvec.apply(expected, base, tmp_path / "expected")
    assert ModelFolder(tmp_path / "merged").digests() == ModelFolder(tmp_path / "expected").digests()

    fine_tuned(base, tmp_path / "tuned", torch.float32)
    vector = taskvec.pack(base, tmp_path / "tuned", tmp_path / "t.lota")
    report = json.loads(
        run("convert", tmp_path / "t.lota", "--base", base, "--to", "shira", "-o", tmp_path / "s", "--json")
    )
    assert report["entries"] == sum(len(vector[name]) for name in vector)
    run("convert", tmp_path / "s", "--base", base, "-o", tmp_path / "back.lota")
    back = TaskVector.open(tmp_path / "back.lota")
    assert all(np.array_equal(back[name].values, vector[name].values) for name in vector)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["v.lota"], "v.lota is a .lota file: --to names what to convert it to (shira, lora, coo, delta)"),
        (["v.lota", "--to", "gguf"], "--to must be shira, lora, coo or delta, found 'gguf'"),
        (["v.lota", "--to", "shira", "--sparsity", "0.5"], "--sparsity has no effect with --to"),
        (["v.lota", "--to", "shira", "--kind", "patch"], "--kind has no effect with --to"),
        (["v.lota", "--to", "shira", "--weights", "1"], "--weights has no effect with --to"),
        (["v.lota", "--to", "shira", "--from", "coo"], "--from has no effect with --to"),
        (["v.lota", "--to", "coo", "--rank", "3"], "--rank has no effect with --to coo"),
        (["v.lota", "--to", "coo"], "--base has no effect with --to coo"),
        (["v.lota", "--to", "lora", "--shard-size", "1GB"], "--shard-size has no effect with --to lora"),
        (["v.lota", "--to", "lora", "--rank", "0"], "--rank must be at least 1, found 0"),
        (["v.lota", "w.lota", "--to", "lora"], "--to converts one .lota file, found 2 sources: merge them first"),
        (["x", "--rank", "3"], "--rank needs --to"),
        (["x", "--from", "peft"], "--from must be coo or delta, found 'peft'; other formats are recognised"),
        (["x", "--from", "coo", "--weights", "1"], "--weights is for adapters of peft"),
        (["x", "--from", "delta", "--kind", "patch"], "--kind has no effect: such a source gives a vector"),
        (["x.wsp"], "x.wsp: no such file or folder"),
        ([__file__], f"{__file__} is no adapter of peft, .wsp file or .safetensors file"),
    ],
)
def test_requests_without_sense_are_refused(base: Path, arguments: list[str], message: str, tmp_path: Path) -> None:
    assert refused(2, "convert", *arguments, "--base", base, "-o", tmp_path / "out") == f"taskvec: {message}\n"


def test_a_merge_of_adapters_needs_their_base(adapter: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*TASKVEC, "merge", str(adapter), "-o", str(tmp_path / "m.lota")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"taskvec: {adapter} is an adapter of peft: --base must name its base\n"
