"""Vectors become LoRA adapters that peft loads, with the errors that the report says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.adapters import make_adapter
from support.commands import ok
from support.models import make_bert, make_gpt2, make_llama, make_mixtral, make_qwen2, perturb
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import taskvec
from taskvec import SparseTensor, TaskVector, interop
from taskvec.errors import AdapterError, BaseMismatchError, KindError, OutputExistsError, UsageError
from taskvec.vectors.vector import vector_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of peft, about models that it does not know
]
WORDS = torch.arange(14).view(2, 7)


def distance(one: TaskVector, other: TaskVector) -> float:
    """The norm of the difference of two vectors divided by that of the first."""
    pairs = [(one.to_torch(name, dense=True), other.to_torch(name, dense=True)) for name in one]
    difference = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    return float(difference / torch.stack([a.norm() for a, _ in pairs]).norm())


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (make_llama, AutoModelForCausalLM),
        (make_qwen2, AutoModelForCausalLM),
        (make_gpt2, AutoModelForCausalLM),
        (make_bert, AutoModelForMaskedLM),
    ],
    ids=["llama", "qwen2", "gpt2", "bert"],
)
def test_an_adapter_of_full_rank_is_the_fine_tune(make: Any, kind: Any, tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    tuned = kind.from_pretrained(perturb(base, tmp_path / "tuned", dtype="float32"))
    vector = taskvec.diff(base, tuned.transformer if make is make_gpt2 else tuned)
    written = interop.to_lora(vector, base, tmp_path / "lora", 64)
    assert written.error < 1e-7
    assert {each.tensor for each in written.layers} | set(written.saved) == set(vector)
    assert all(each.rank == min(each.shape) for each in written.layers)
    adapted = PeftModel.from_pretrained(kind.from_pretrained(base), written.path)
    for model in (adapted, adapted.merge_and_unload()):
        assert torch.allclose(model(WORDS).logits, tuned(WORDS).logits, atol=1e-6)
    if make is not make_bert:  # peft separates the bias of its output layer
        back = interop.from_peft(written.path, base)
        assert distance(vector, back) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_vector_of_a_lora_gives_it_back(dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", dtype=str(dtype).removeprefix("torch."))
    adapter = make_adapter(base, tmp_path / "adapter", dtype, r=3)
    vector = interop.from_peft(adapter, base)
    written = interop.to_lora(vector, base, tmp_path / "lora", 3)
    # a delta is the difference of two weights, which are rounded to their dtype
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    assert 0 < written.error < rounding
    assert distance(vector, interop.from_peft(written.path, base)) < rounding
    if dtype == torch.float32:
        whole = interop.to_lora(vector, base, tmp_path / "whole", 16)
        assert whole.error <= written.error


def test_errors_are_those_of_the_written_factors(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    perturb(base, tmp_path / "tuned", dtype="float32")
    vector = taskvec.diff(base, tmp_path / "tuned")
    written = interop.to_lora(vector, base, tmp_path / "lora", 5)
    tensors = load_file(written.path / "adapter_model.safetensors")
    squares = np.zeros(2)
    for layer in written.layers:
        start = f"base_model.model.{layer.tensor.removesuffix('.weight')}.lora_"
        product = tensors[f"{start}B.weight"].double() @ tensors[f"{start}A.weight"].double()
        delta = vector.to_torch(layer.tensor, dense=True).double()
        assert layer.rank == 5
        assert layer.error == pytest.approx(float((delta - product).norm() / delta.norm()))
        squares += float((delta - product).square().sum()), float(delta.square().sum())
    assert written.error == pytest.approx(np.sqrt(squares[0] / squares[1]))
    assert written.saved == ("model.embed_tokens.weight", *sorted(name for name in vector if "norm" in name))
    again = interop.to_lora(vector, base, tmp_path / "again", 5)
    assert all(file.read_bytes() == (again.path / file.name).read_bytes() for file in written.path.iterdir())


def test_layers_of_lower_rank_have_lower_ranks(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", r=8, rank_pattern={"v_proj": 2})
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).get_base_model()
    forms, deltas = {}, {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and name.endswith(("q_proj", "v_proj")):
            key = f"{name}.weight"
            # integers, so that the ranks are exact
            b, a = (torch.round(4 * part["default"].weight.detach()) for part in (module.lora_B, module.lora_A))
            dense = (b @ a).numpy().astype(np.float32).reshape(-1)
            at = np.flatnonzero(dense)
            forms[key] = taskvec.open_checkpoint(base).tensors[key].form
            deltas[key] = SparseTensor(forms[key].shape, at, dense[at])
    vector = vector_of(taskvec.open_checkpoint(base), forms, deltas, {})
    written = interop.to_lora(vector, base, tmp_path / "lora", 64)
    assert {each.rank for each in written.layers if "v_proj" in each.tensor} == {2}
    assert {each.rank for each in written.layers if "q_proj" in each.tensor} == {8}
    assert written.error < 1e-6
    config = json.loads((written.path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == written.rank == 8
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert distance(vector, interop.from_peft(written.path, base)) < 1e-5


def test_what_an_adapter_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    perturb(base, tmp_path / "tuned", dtype="float32")
    vector = taskvec.diff(base, tmp_path / "tuned")
    out = tmp_path / "lora"
    with pytest.raises(KindError, match="is a patch, which has no deltas"):
        interop.to_lora(taskvec.diff(base, tmp_path / "tuned", kind="patch"), base, out)
    with pytest.raises(BaseMismatchError, match="was taken from base, not from other"):
        interop.to_lora(vector, make_llama(tmp_path / "other", seed=1), out)
    with pytest.raises(UsageError, match="`rank` must be at least 1"):
        interop.to_lora(vector, base, out, 0)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight += 1
    with pytest.raises(AdapterError, match="changes no linear layer or embedding"):
        interop.to_lora(taskvec.diff(base, model), base, out)
    mixtral = make_mixtral(tmp_path / "mixtral")
    experts = taskvec.diff(mixtral, perturb(mixtral, tmp_path / "experts", dtype="float32"))
    with pytest.raises(
        AdapterError, match=r"tensor '.*experts\.0\.w1\.weight' is neither the weight of a linear layer"
    ):
        interop.to_lora(experts, mixtral, out)
    assert not out.exists()
    interop.to_lora(vector, base, out)
    with pytest.raises(OutputExistsError):
        interop.to_lora(vector, base, out)
    interop.to_lora(vector, base, out, force=True)


def test_changes_that_are_no_deltas_are_counted(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 0.1
        model.model.layers[0].self_attn.q_proj.weight[0, :3] = torch.nan
    assert interop.to_lora(taskvec.diff(base, model), base, tmp_path / "lora").dropped == 3


def test_the_command_reports_errors(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    taskvec.pack(base, perturb(base, tmp_path / "tuned", dtype="float32"), tmp_path / "t.lota")
    command = ["convert", tmp_path / "t.lota", "--base", base, "--to", "lora", "--rank", "4", "-o", tmp_path / "lora"]
    report = json.loads(ok(*command, "--json"))
    assert (report["format"], report["rank"], len(report["layers"]), report["dropped"]) == ("lora", 4, 14, 0)
    assert {each["rank"] for each in report["layers"]} == {4}
    first, second, *table = ok(*command, "--force").splitlines()
    assert first.endswith(f": a LoRA adapter of 14 layers, r = 4, relative error {report['error']:.2%}")
    assert second.startswith("stored with their tuned values: 6 tensors (model.embed_tokens.weight, ")
    assert any(line.split()[:3] == ["self_attn.q_proj", "2", "4"] for line in table)
