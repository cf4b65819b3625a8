"""Differences of models in memory: equal to those of the folders that save_pretrained writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.models import make_gpt2, make_llama, make_mixtral
from torch import nn
from transformers import PreTrainedModel

from taskvec import TaskVector, apply, attach, diff, pack
from taskvec.errors import TrainingError, UsageError
from taskvec.models.loading import load_weights
from taskvec_formats import ModelFolder

pytestmark = pytest.mark.slow


def pair(folder: Path, make: Callable[[Path], Path] = make_llama) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two states of one model."""
    base = make(folder / "made")
    models = [load_weights(base, {}) for _ in range(2)]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in list(models[1].parameters())[::2]:
            parameter.view(-1)[::3] += torch.randn(parameter.view(-1)[::3].shape).to(parameter.dtype)
    return models[0], models[1]


def saved(model: PreTrainedModel, folder: Path) -> ModelFolder:
    model.save_pretrained(folder)
    return ModelFolder(folder)


def entries(vector: TaskVector) -> dict[str, tuple[list[int], list[float]]]:
    return {name: (entry.indices.tolist(), entry.values.tolist()) for name, entry in vector.items()}


@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_mixtral])
@pytest.mark.parametrize("kind", ["vector", "patch"])
def test_the_difference_is_that_of_the_saved_folders(kind: str, make: Callable[[Path], Path], tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, make)
    vector = diff(base, tuned, kind=kind)
    one, two = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    expected = diff(one, two, kind=kind)
    assert vector.base.fingerprint == expected.base.fingerprint
    assert vector.header.tuned.fingerprint == expected.header.tuned.fingerprint
    assert vector.specs == expected.specs
    vector.save(tmp_path / "live.lota")
    assert apply(tmp_path / "live.lota", one, tmp_path / "out").differences == ()
    out = ModelFolder(tmp_path / "out")
    assert all(out.digest(name) == two.digest(name) for name in two.tensors)
    if kind == "vector":
        assert entries(vector) == entries(expected)
        assert entries(diff(base, tuned, 0.9)) == entries(diff(one, two, 0.9))


def test_later_changes_of_the_models_do_not_change_the_vector(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    vector = diff(base, tuned)
    expected = entries(diff(saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned")))
    with torch.no_grad():
        for model in (base, tuned):
            for parameter in model.parameters():
                parameter += 1
    assert entries(vector) == expected
    vector.save(tmp_path / "x.lota")
    assert apply(tmp_path / "x.lota", tmp_path / "base", tmp_path / "out").exact
    assert ModelFolder(tmp_path / "out").fingerprint == ModelFolder(tmp_path / "tuned").fingerprint


@pytest.mark.parametrize("names", ["state_dict", "checkpoint"])
@pytest.mark.parametrize("make", [make_llama, make_mixtral])
def test_a_state_dict_is_one_side(names: str, make: Callable[[Path], Path], tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, make)
    expected = diff(base, tuned)
    before, after = base.state_dict(), tuned.state_dict()
    if names == "checkpoint":
        before = load_file(saved(base, tmp_path / "base").path / "model.safetensors")
        after = load_file(saved(tuned, tmp_path / "tuned").path / "model.safetensors")
    vectors = [diff(base, after), diff(before, tuned)]
    if names == "checkpoint":
        vectors.append(diff(before, after))
    for vector in vectors:
        assert entries(vector) == entries(expected)
    with attach(base, diff(base, after)):
        assert all(torch.equal(a, b) for a, b in zip(base.parameters(), tuned.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["vector", "patch"])
def test_pack_writes_the_difference_of_models_in_memory(kind: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)  # half of the parameters are equal
    saved(base, tmp_path / "base")
    state = {name: values + 1 if "norm" in name else values for name, values in base.state_dict().items()}
    added = {**state, "added": torch.ones(3), "model.norm.weight": torch.ones(5)}
    sides = [(base, tuned), (base.state_dict(), added), (tmp_path / "base", tuned), (tuned, tmp_path / "base")]
    for number, (one, other) in enumerate([*sides, (base, base)]):
        diff(one, other, kind=kind).save(tmp_path / f"{number}.lota")
        pack(one, other, tmp_path / f"{number}.packed.lota", kind=kind)
        assert (tmp_path / f"{number}.packed.lota").read_bytes() == (tmp_path / f"{number}.lota").read_bytes()


def test_a_folder_is_one_side(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    folder = saved(base, tmp_path / "base")
    vector = diff(tmp_path / "base", tuned)
    assert entries(vector) == entries(diff(base, tuned))
    vector.save(tmp_path / "x.lota")
    apply(tmp_path / "x.lota", folder, tmp_path / "out")
    assert ModelFolder(tmp_path / "out").fingerprint == saved(tuned, tmp_path / "tuned").fingerprint
    back = diff(tuned, tmp_path / "base")
    with attach(tuned, back):
        assert all(torch.equal(a, b) for a, b in zip(base.parameters(), tuned.parameters(), strict=True))


def test_a_state_dict_with_tied_names_is_compared_with_a_folder(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    folder = saved(base, tmp_path / "base")
    assert "lm_head.weight" in tuned.state_dict().keys() - folder.tensors.keys()
    for vector in (diff(folder, tuned.state_dict()), diff(folder, dict(sorted(tuned.state_dict().items())))):
        assert entries(vector) == entries(diff(base, tuned))
    assert diff(tuned.state_dict(), folder).specs.keys() == diff(tuned, folder).specs.keys()


def test_any_module_and_any_dtype(tmp_path: Path) -> None:
    def state(offset: int) -> dict[str, torch.Tensor]:
        return {
            "ids": torch.arange(5) + offset,
            "mask": torch.tensor([True, False, bool(offset)]),
            "half": torch.ones(3, 2, dtype=torch.bfloat16) * (1 + offset),
            "scale": torch.tensor(2.0 + offset),
            "none": torch.empty(0),
        }

    vector = diff(state(0), state(1), kind="patch")
    assert sorted(vector.specs) == ["half", "ids", "mask", "scale"]
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    with attach(one, diff(one, two)):
        assert torch.equal(one.weight, two.weight)
        assert torch.equal(one.bias, two.bias)


def test_states_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    state = tuned.state_dict()
    lacking = {name: tensor for name, tensor in state.items() if name != "model.norm.weight"}
    with pytest.raises(UsageError, match=r"^tuned lacks tensor 'model.norm.weight', which LlamaForCausalLM has$"):
        diff(base, lacking)
    with pytest.raises(UsageError, match=r"^base has tensor 'other', which LlamaForCausalLM lacks$"):
        diff({**state, "other": torch.ones(1)}, tuned)
    with pytest.raises(UsageError, match=r"^tensor 'w' of a state dict must be a torch.Tensor, found list$"):
        diff({"w": [1.0]}, {"w": torch.ones(1)})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="tuned must be a Checkpoint or a path, found 3"):
        diff(base, 3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the names of a state dict must be of type str, found 1"):
        diff({1: torch.ones(1)}, {"w": torch.ones(1)})  # type: ignore[dict-item]
    with pytest.raises(TrainingError, match="tensor 'w' is nested or sparse"):
        diff({"w": torch.ones(2, 2).to_sparse()}, {"w": torch.ones(2, 2)})
    adapted = get_peft_model(pair(tmp_path / "other")[0], LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(TrainingError, match=r"LlamaForCausalLM has adapters of peft.*merge_and_unload"):
        diff(base, adapted)
    assert isinstance(diff(adapted.unload(), tuned), TaskVector)
    with torch.device("meta"):
        empty = type(base)(base.config)
    with pytest.raises(TrainingError, match="is on the meta device: it has no values"):
        diff(base, empty)
    with pytest.raises(TrainingError, match="complex"):
        diff({"w": torch.ones(1, dtype=torch.complex128)}, {"w": torch.ones(1)})
