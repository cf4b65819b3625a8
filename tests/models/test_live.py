"""Vectors on a live model: which ones cannot be put on, and weights that go by two names."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.building import tensor, write_checkpoint

from taskvec import diff
from taskvec.errors import TrainingError
from taskvec.models.live import applied
from taskvec.models.loading import load_model
from taskvec_formats import ModelFolder


@pytest.mark.parametrize("what", ["added", "removed", "resized"])
def test_a_live_model_cannot_gain_or_lose_tensors(what: str, llama: Path, tmp_path: Path) -> None:
    """An added lm_head would be written over the embeddings that the model ties it to."""
    common = {"w": tensor("F32", np.ones((2, 3)))}
    other = {
        "added": {**common, "lm_head.weight": tensor("F32", np.ones(3))},
        "removed": {},
        "resized": {"w": tensor("F32", np.ones((3, 2)))},
    }[what]
    base = {**common, "v": tensor("F32", np.ones(2))}
    tuned = {**other, "v": tensor("F32", np.zeros(2))}
    for name, tensors in (("base", base), ("tuned", tuned)):
        write_checkpoint(tmp_path / name, tensors, 1, {})
    vector = diff(ModelFolder(tmp_path / "base"), ModelFolder(tmp_path / "tuned"))
    with (
        pytest.raises(TrainingError, match="adds, removes or resizes tensors: apply it"),
        applied(torch.nn.Linear(2, 2), vector, ModelFolder(tmp_path / "base")),
    ):
        pass


def test_tied_weights_stored_twice_come_back_as_they_were(llama: Path, tuned: Path, tmp_path: Path) -> None:
    """The vector then touches the model's one parameter under two names."""
    folders = []
    for source in (llama, tuned):
        folder = tmp_path / source.name
        shutil.copytree(source, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        folders.append(ModelFolder(folder))
    model, _ = load_model(folders[0].path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = model.lm_head.weight.detach().clone()
    with applied(model, diff(*folders), folders[0]):
        after = model.lm_head.weight.detach().clone()
    assert torch.equal(after, load_model(tuned)[0].lm_head.weight)
    assert torch.equal(model.lm_head.weight, before)


def test_a_model_that_was_moved_or_cast_within_the_block_is_restored(llama: Path, tmp_path: Path) -> None:
    tuned = {name: values + 0.5 for name, values in load_file(llama / "model.safetensors").items()}
    shutil.copytree(llama, tmp_path / "tuned")
    save_file(tuned, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    base = ModelFolder(llama)
    model, _ = load_model(llama)
    before = {name: values.clone() for name, values in model.named_parameters()}
    with applied(model, diff(base, ModelFolder(tmp_path / "tuned")), base):
        model.to(torch.float64)
        assert all(not torch.equal(values, before[name].double()) for name, values in model.named_parameters())
    assert all(torch.equal(values, before[name].double()) for name, values in model.named_parameters())
