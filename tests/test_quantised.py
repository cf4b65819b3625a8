"""A vector of a model in full precision does not fit a quantised one, and the message says what to use instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import make_adapter
from support.commands import ok, refused
from support.models import make_llama, perturb

import taskvec
from taskvec import interop
from taskvec.errors import ConversionError

Weights = dict[str, torch.Tensor]


def bitsandbytes(name: str, values: torch.Tensor) -> Weights:
    packed = torch.zeros(values.numel() // 2, 1, dtype=torch.uint8)
    return {name: packed, f"{name}.absmax": torch.ones(3), f"{name}.quant_map": torch.ones(16)}


def gptq(name: str, values: torch.Tensor) -> Weights:
    start, (rows, columns) = name.removesuffix("weight"), values.shape
    packed = torch.zeros(columns // 8, rows, dtype=torch.int32)
    return {f"{start}qweight": packed, f"{start}scales": torch.ones(1, rows).half()}


def fp8(name: str, values: torch.Tensor) -> Weights:
    return {name: values.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}


def quantised(base: Path, folder: Path, method: Callable[[str, torch.Tensor], Weights]) -> Path:
    shutil.copytree(base, folder)
    tensors: Weights = {}
    for name, values in load_file(base / "model.safetensors").items():
        tensors |= method(name, values) if "proj" in name else {name: values}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method.__name__}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/, tuned/, adapter/, and a vector in v.lota, coo.safetensors and delta.safetensors."""
    folder = tmp_path_factory.mktemp("quantised")
    base = make_llama(folder / "base", dtype="bfloat16")
    taskvec.pack(base, perturb(base, folder / "tuned", dtype="bfloat16"), folder / "v.lota")
    make_adapter(base, folder / "adapter", torch.bfloat16)
    interop.to_coo(folder / "v.lota", folder / "coo.safetensors")
    interop.to_delta(folder / "v.lota", base, folder / "delta.safetensors")
    return folder


def commands(folder: Path, base: Path, out: Path) -> dict[str, list[object]]:
    """The commands that apply something to a base."""
    vector, adapter = folder / "v.lota", folder / "adapter"
    return {
        "unpack": ["unpack", vector, "--base", base, "-o", out],
        "verify": ["verify", vector, "--base", base],
        "merge": ["merge", vector, "--base", base, "-o", out],
        "convert": ["convert", adapter, "--base", base, "-o", out.with_suffix(".lota")],
        "pack": ["pack", base, adapter, "-o", out.with_suffix(".lota")],
        "shira": ["convert", vector, "--base", base, "--to", "shira", "-o", out],
        "lora": ["convert", vector, "--base", base, "--to", "lora", "-o", out],
        "delta": ["convert", vector, "--base", base, "--to", "delta", "-o", out],
        "from coo": ["convert", folder / "coo.safetensors", "--base", base, "-o", out],
        "from delta": ["convert", folder / "delta.safetensors", "--from", "delta", "--base", base, "-o", out],
    }


@pytest.mark.parametrize("method", [bitsandbytes, gptq, fp8])
def test_a_quantised_base_is_refused(
    folder: Path, method: Callable[[str, torch.Tensor], Weights], tmp_path: Path
) -> None:
    base = quantised(folder / "base", tmp_path / "small", method)
    hint = f"small is quantised ({method.__name__}, says its config.json): use the model that it was quantised from, "
    for command in commands(folder, base, tmp_path / "out").values():
        assert hint + "and quantise the result" in refused(1, *command)
    assert not (tmp_path / "out").exists()


def test_coordinates_without_a_base_are_not_added_to_scaled_weights(folder: Path, tmp_path: Path) -> None:
    base = quantised(folder / "base", tmp_path / "small", fp8)
    save_file(load_file(folder / "coo.safetensors"), tmp_path / "other.safetensors")
    with pytest.raises(ConversionError, match=r"does not name its base by fingerprint.*small is quantised \(fp8"):
        interop.from_coo(tmp_path / "other.safetensors", base, are_deltas=True)


def test_two_quantised_models_have_an_exact_difference(folder: Path, tmp_path: Path) -> None:
    for method in (bitsandbytes, gptq, fp8):
        base = quantised(folder / "base", tmp_path / f"{method.__name__}-base", method)
        tuned = quantised(folder / "tuned", tmp_path / f"{method.__name__}-tuned", method)
        vector = tmp_path / f"{method.__name__}.lota"
        ok("pack", base, tuned, "-o", vector)
        said = ok("unpack", vector, "--base", base, "-o", tmp_path / f"{method.__name__}-out")
        assert said.endswith("identical to the tuned checkpoint, byte for byte\n")


def test_gguf_files_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(200))
    (tmp_path / "small").mkdir()
    shutil.copy(tmp_path / "model.gguf", tmp_path / "small")
    hint = "use the safetensors model that it was made from, and convert the result"
    for base, what in (
        (tmp_path / "model.gguf", "model.gguf is a GGUF file, whose weights are converted and often quantised"),
        (tmp_path / "small", "small holds no .safetensors file, but model.gguf, whose weights are converted"),
    ):
        for command in [
            *commands(folder, base, tmp_path / "out").values(),
            ["pack", base, folder / "tuned", "-o", tmp_path / "x.lota"],
            ["pack", folder / "base", base, "-o", tmp_path / "x.lota"],
        ]:
            said = refused(2, *command)
            assert what in said
            assert hint in said
    said = refused(2, "unpack", tmp_path / "model.gguf", "--base", folder / "base", "-o", tmp_path / "out")
    assert "model.gguf is a GGUF file, not a .lota file" in said
