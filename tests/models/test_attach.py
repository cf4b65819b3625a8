"""Vectors on running models: exact after any sequence of operations, and refused where they do not fit."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.building import tensor, write_checkpoint
from support.live import Small, changed, loaded, on_disk, random_steps, state_of, task
from support.models import make_gpt2, make_llama, make_mixtral
from torch import nn
from torch.nn.utils import parametrize, prune

import taskvec
from taskvec import TaskVector, attach, attached, compose, diff, merge
from taskvec.applying.overlay import Patched
from taskvec.errors import AlreadyAppliedError, BaseMismatchError, TrainingError, UsageError
from taskvec.models import edits
from taskvec.models.live_state import CACHE
from taskvec.models.live_state import state_of as live_state
from taskvec.models.loading import load_model, load_weights
from taskvec.models.placement import bits_of
from taskvec_formats import ModelFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def tasks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and five vectors: the first three are disjoint from one another, the last two overlap with all."""
    folder = tmp_path_factory.mktemp("tasks")
    base = make_llama(folder / "base", dtype=request.param)
    slices = [slice(0, None, 3), slice(1, None, 3), slice(2, None, 3), slice(None), slice(None)]
    return base, [task(base, folder / f"{n}.lota", slices[n], seed=n) for n in range(5)]


# exactness


def test_random_steps_leave_what_a_fresh_application_gives(tasks: tuple[Path, list[Path]]) -> None:
    folder, files = tasks
    refused, shared = random_steps(loaded(folder), ModelFolder(folder), files, 120)
    assert shared == 7
    assert refused


@pytest.fixture
def several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide writes among several threads, as those of large models are."""
    monkeypatch.setattr(edits, "_PARALLEL", 0)
    monkeypatch.setenv("TASKVEC_THREADS", "4")


@pytest.mark.usefixtures("several_threads")
def test_random_steps_of_several_threads(tasks: tuple[Path, list[Path]]) -> None:
    folder, files = tasks
    with torch.inference_mode():  # the mode belongs to the thread
        model = loaded(folder)
        assert random_steps(model, ModelFolder(folder), files, 40, seed=1)[0]


@pytest.mark.parametrize("kind", ["vector", "patch"])
def test_a_whole_fine_tune_is_attached_and_taken_off(kind: str, llama: Path, tuned: Path) -> None:
    base, after = ModelFolder(llama), ModelFolder(tuned)
    model = loaded(llama)
    with attach(model, diff(base, after, kind=kind)) as handle:
        assert state_of(model, base) == on_disk(after)
        assert handle.entries == sum(len(edit.indices) for edit in handle.edits)
        assert handle.bytes_kept == 12 * handle.entries
    assert state_of(model, base) == on_disk(base)


def test_values_that_are_no_ordinary_numbers_come_back_to_the_bit(tmp_path: Path) -> None:
    """−0.0, NaN payloads and infinities, in the base and in the tuned model."""
    base = make_llama(tmp_path / "base")
    shutil.copytree(base, tmp_path / "tuned")
    odd = torch.tensor(
        [0x80000000, 0x7FC00001, 0xFFC12345, 0x7F800000, 0xFF800000, 0, 1, 0x3F800000], dtype=torch.int64
    )
    odd = odd.to(torch.int32).view(torch.float32)
    name = "model.layers.0.self_attn.q_proj.weight"
    for folder, values in ((base, odd), (tmp_path / "tuned", odd.flip(0))):
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[: len(values)] = values
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    one, other = ModelFolder(base), ModelFolder(tmp_path / "tuned")
    model = loaded(base)
    for kind in ("vector", "patch"):
        with attach(model, diff(one, other, kind=kind)):
            assert state_of(model, one) == on_disk(other)
        assert state_of(model, one) == on_disk(one)


def test_a_list_is_merged_as_merge_does(small: Small, tmp_path: Path) -> None:
    model, base, files = small
    third = task(base.path, tmp_path / "2.lota", slice(None), seed=9)
    ties = merge([*files, third], method="ties", weights=[1, 2, 0.5], density=0.2)
    with attach(model, [*files, third], method="ties", weights=[1, 2, 0.5], density=0.2) as handle:
        assert state_of(model, base) == on_disk(Patched(base, ties))
        assert handle.name == ties.name
        handle.swap([TaskVector.open(file) for file in files], 0.5)
        assert state_of(model, base) == on_disk(Patched(base, 0.5 * merge(files)))
    one, two = map(TaskVector.open, files)
    with attach(model, 2 * one - 0.5 * two):
        assert state_of(model, base) == on_disk(Patched(base, 2 * one - 0.5 * two))
    with pytest.raises(UsageError, match="`method` has no effect here: only a list of vectors is merged"):
        attach(model, files[0], method="ties")
    with pytest.raises(UsageError, match="nothing to merge"):
        attach(model, [])
    assert state_of(model, base) == on_disk(base)


# models


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
    with attach(model, diff(*folders)):
        after = model.lm_head.weight.detach().clone()
    assert torch.equal(after, load_model(tuned)[0].lm_head.weight)
    assert torch.equal(model.lm_head.weight, before)

    tensors = load_file(folders[1].path / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, folders[1].path / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match=r"is tied to another one, but .* changes them differently"):
        attach(model, diff(folders[0], ModelFolder(folders[1].path)))
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("make", [make_gpt2, make_mixtral])
def test_names_and_layouts_of_the_model_are_found(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """GPT-2 is saved without a prefix; Mixtral's experts are fused into one parameter."""
    base = make(tmp_path / "base")
    tuned = ModelFolder(changed(base, tmp_path / "tuned", slice(None), seed=1))
    model = loaded(base)
    folder = ModelFolder(base)
    with attach(model, diff(folder, tuned)):
        assert state_of(model, folder) == {name: on_disk(tuned)[name] for name in state_of(model, folder)}
        ids = torch.arange(5)[None]
        assert torch.equal(model(ids).logits, loaded(tuned.path)(ids).logits)
    assert state_of(model, folder) == {name: on_disk(folder)[name] for name in state_of(model, folder)}


def test_wrappers_are_looked_through(small: Small) -> None:
    peft = pytest.importorskip("peft")
    model, base, files = small
    expected = on_disk(Patched(base, TaskVector.open(files[0])))
    ids = torch.arange(6)[None]
    compiled = torch.compile(model, backend="eager")
    before = compiled(ids).logits
    with attach(compiled, files[0]):
        assert state_of(model, base) == expected
        assert not torch.equal(compiled(ids).logits, before)
        assert torch.equal(compiled(ids).logits, model(ids).logits)
    assert torch.equal(compiled(ids).logits, before)
    assert attached(compiled) == attached(model) == []
    with attach(nn.DataParallel(model), files[0]):
        assert state_of(model, base) == expected
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    weight = model.model.layers[0].self_attn.q_proj.base_layer.weight
    kept = weight.detach().clone()
    with attach(adapted, files[0]):
        bits = bits_of(base.tensors["model.layers.0.self_attn.q_proj.weight"].dtype, weight.view(-1))
        assert bits.tobytes() == expected["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(weight, kept)


def test_a_model_in_a_wider_dtype_computes_with_the_same_weights(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", dtype="bfloat16")
    file = task(base, tmp_path / "x.lota", slice(None), seed=1)
    model = load_weights(base, {"dtype": "float32"})
    with attach(model, file):
        expected = load_weights(tmp_path / "x", {"dtype": "float32"})
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    original = load_weights(base, {"dtype": "float32"})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_a_model_in_a_narrower_dtype_needs_the_base(small: Small, tmp_path: Path) -> None:
    _, base, files = small
    model = load_weights(base.path, {"dtype": "bfloat16"})
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(BaseMismatchError, match=r"is BF16 in the model and F32 in its checkpoint: .* base"):
        attach(model, files[0])
    with attach(model, files[0], base=base.path):
        expected = load_weights(files[0].with_suffix(""), {"dtype": "bfloat16"})
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    model.model.norm.weight.data += 1
    with pytest.raises(BaseMismatchError, match=r"'model\.norm\.weight' of the model does not have the values of base"):
        attach(model, files[1], base=base)


def test_a_model_that_was_moved_or_cast_is_restored(small: Small) -> None:
    model, _, files = small
    before = [parameter.clone() for parameter in model.parameters()]
    with attach(model, files[0]) as handle:
        model.to(torch.float64)
        with handle.enabled(False):
            assert all(torch.equal(a, b.double()) for a, b in zip(model.parameters(), before, strict=True))
        handle.swap(files[1])
    assert all(torch.equal(a, b.double()) for a, b in zip(model.parameters(), before, strict=True))


# refusals


def test_other_weights_are_refused_and_left_alone(small: Small, tmp_path: Path) -> None:
    _, base, files = small
    other = loaded(make_llama(tmp_path / "other", seed=7))
    before = state_of(other, base)
    with pytest.raises(BaseMismatchError, match=r"^the model is not the base of 0.lota \(base\): tensor .* values"):
        attach(other, files[0])
    tuned = loaded(files[0].with_suffix(""))
    with pytest.raises(AlreadyAppliedError, match=r"^0.lota is applied to the model already: tensor"):
        attach(tuned, files[0])
    gpt = loaded(make_gpt2(tmp_path / "gpt"))
    with pytest.raises(TrainingError, match="the model has no parameter for tensor"):
        attach(gpt, files[0])
    assert state_of(other, base) == before
    assert attached(other) == attached(tuned) == attached(gpt) == []


def test_weights_that_someone_else_changed_are_noticed(small: Small) -> None:
    """A vector that is decoded already is compared with the weights again, also if torch counts no change."""
    model, base, files = small
    weights = model.model.norm.weight.data
    handle = attach(model, files[0])
    with handle.enabled(False):
        before = weights.clone()
    tuned = weights.clone()
    weights += 1
    changed = state_of(model, base)
    with pytest.raises(BaseMismatchError, match=r"'model\.norm\.weight' of the model has other values than before"):
        handle.detach()
    assert state_of(model, base) == changed
    weights.copy_(tuned)
    handle.detach()
    assert torch.equal(weights, before)
    weights += 1
    with pytest.raises(BaseMismatchError, match=r"'model\.norm\.weight' of the model has other values than before"):
        attach(model, files[0])
    assert attached(model) == []


def test_a_change_that_torch_does_not_count_is_noticed(small: Small) -> None:
    """Vectors without digests of the elements that they change are compared with whole tensors, each time anew."""
    model, base, files = small
    attach(model, files[0], 0.5).detach()
    model.model.layers[0].mlp.up_proj.weight.data.add_(1.0)
    before = state_of(model, base)
    with pytest.raises(BaseMismatchError, match=r"tensor 'model\.layers\.0\.mlp\.up_proj\.weight' has other values"):
        attach(model, files[1], 0.5)
    assert state_of(model, base) == before


def wrapped_by_modules_to_save(model: Any) -> None:
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["k_proj"]))


def pruned(model: Any) -> None:
    prune.identity(model.model.layers[0].self_attn.k_proj, "weight")


def parametrized(model: Any) -> None:
    parametrize.register_parametrization(model.model.layers[0].self_attn.k_proj, "weight", nn.Identity())


def without_a_parameter(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.weight = None


@pytest.mark.parametrize("change", [wrapped_by_modules_to_save, pruned, parametrized, without_a_parameter])
def test_layers_that_were_replaced_are_noticed(change: Callable[[Any], None], small: Small) -> None:
    model, _, files = small
    handle = attach(model, files[0])
    change(model)
    with pytest.raises(
        BaseMismatchError, match=r"no longer has a parameter 'model\.layers\.0\.self_attn\.k_proj\.weight'"
    ):
        handle.detach()
    assert attached(model) == [handle]
    handle.forget()
    assert attached(model) == []
    assert handle.name is None


def test_tied_weights_that_were_untied_are_noticed(llama: Path, tuned: Path) -> None:
    model = loaded(llama)
    if not model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    handle = attach(model, diff(ModelFolder(llama), ModelFolder(tuned)).shrink(0.9))
    embedding = next(edit for edit in handle.edits if "embed" in edit.parameter or "lm_head" in edit.parameter)
    assert embedding.names == 2
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(BaseMismatchError, match=r"was tied or untied .*: it had 2 names, and has 1"):
        handle.detach()


def test_adapters_of_peft_may_come_and_go(small: Small) -> None:
    model, base, files = small
    handle = attach(model, files[0])
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    handle.swap(files[1])
    inside = attach(adapted, files[0])  # decoded under the names of peft's layers
    assert adapted.unload() is model
    inside.detach()
    handle.detach()
    assert state_of(model, base) == on_disk(base)


def test_vectors_may_be_swapped_when_adapters_came_and_went(small: Small, tmp_path: Path) -> None:
    model, base, files = small
    both = task(base.path, tmp_path / "both.lota", slice(None), seed=5)
    handle = attach(model, files[0])
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    handle.swap(files, method="linear")  # compared as whole tensors, without what is attached
    with pytest.raises(UsageError, match="both change"):
        attach(adapted, both)
    handle.swap(both)
    adapted.unload()
    handle.swap(files[1])
    assert state_of(model, base) == on_disk(Patched(base, TaskVector.open(files[1])))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_copy_that_peft_computes_with_is_refused(small: Small) -> None:
    model, _, files = small
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"]))
    with pytest.raises(TrainingError, match=r"lm_head\.original_module\.weight' is kept by peft"):
        attach(adapted, files[0])


@pytest.mark.parametrize("several", [False, True])
def test_an_interruption_leaves_weights_and_handle_in_agreement(
    several: bool, small: Small, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in the middle of a swap is handled when the swap is complete."""
    if several:
        request.getfixturevalue("several_threads")
    model, base, files = small
    handle = attach(model, files[1])
    handle.swap(files[0])  # both are decoded now
    put, main, calls = edits.put, threading.get_ident(), itertools.count()

    def interrupted(bits: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
        if next(calls) == 5:
            signal.pthread_kill(main, signal.SIGTERM)
        put(bits, indices, values)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        monkeypatch.setattr(edits, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            handle.swap(files[1])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert handle.name == "1.lota"
    assert state_of(model, base) == on_disk(Patched(base, TaskVector.open(files[1])))
    handle.detach()
    assert state_of(model, base) == on_disk(base)


def test_weights_that_cannot_be_read_are_refused_with_a_handle(small: Small) -> None:
    model, _, files = small
    handle = attach(model, files[0])
    layer = model.model.layers[0].self_attn.k_proj
    layer.weight.data = layer.weight.data.T.contiguous().T
    with pytest.raises(TrainingError, match=r"k_proj\.weight' is not contiguous"):
        handle.detach()
    model.to("meta")
    with pytest.raises(TrainingError, match="meta device"):
        handle.swap(files[1])


def test_a_part_of_a_model_has_no_vectors_of_its_own(small: Small) -> None:
    model, _, files = small
    handle = attach(model, files[0])
    with pytest.raises(UsageError, match=r"0\.lota is attached to a LlamaForCausalLM that shares weights"):
        attach(model.model, files[1])
    handle.detach()
    with attach(model.model, None) as part:
        assert attached(model.model) == [part]


def test_a_second_application_and_shared_positions_are_refused(small: Small, tmp_path: Path) -> None:
    model, base, files = small
    third = task(base.path, tmp_path / "all.lota", slice(None), seed=3)
    with attach(model, files[0]), attach(model, files[1]) as second:
        both = state_of(model, base)
        for file, other in ((files[0], "0"), (third, "0")):
            with pytest.raises(
                UsageError, match=rf"{file.stem}.lota and {other}.lota, which is attached, both change \d+"
            ):
                attach(model, file)
        with pytest.raises(UsageError, match="both change"):
            second.swap(third)
        assert state_of(model, base) == both
        assert second.name == "1.lota"
    assert state_of(model, base) == on_disk(base)


@pytest.mark.parametrize("what", ["added", "removed", "resized"])
def test_a_live_model_cannot_gain_or_lose_tensors(what: str, tmp_path: Path) -> None:
    common = {"weight": tensor("F32", np.ones((2, 2)))}
    tuned = {
        "added": {**common, "lm_head.weight": tensor("F32", np.ones(3))},
        "removed": {},
        "resized": {"weight": tensor("F32", np.ones((3, 2)))},
    }[what]
    one = write_checkpoint(tmp_path / "base", {**common, "bias": tensor("F32", np.ones(2))}, 1, {})
    two = write_checkpoint(tmp_path / "tuned", {**tuned, "bias": tensor("F32", np.zeros(2))}, 1, {})
    with pytest.raises(TrainingError, match="adds, removes or resizes tensors: apply it"):
        attach(nn.Linear(2, 2), diff(one, two))


def test_models_whose_parameters_are_not_the_weights_are_refused(
    small: Small,
) -> None:
    model, _, files = small
    quantised = copy.deepcopy(model)
    quantised.quantization_method = "bitsandbytes"
    with pytest.raises(TrainingError, match=r"LlamaForCausalLM is quantised: .* load it without quantisation"):
        attach(quantised, files[0])
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(TrainingError, match="meta"):
        attach(empty, files[0])
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data = layer.weight.data.T.contiguous().T
    with pytest.raises(TrainingError, match="contiguous"):
        attach(model, files[0])
    assert attached(model) == []


def check_failures(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base, files = small
    handle = attach(model, files[0])
    before = state_of(model, base)
    put = edits.put

    for fails in (1, 5, 25):
        calls = itertools.count(1)

        def failing(bits: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
            if next(calls) == fails:  # noqa: B023  # it is called within the loop
                raise RuntimeError("the device is gone")
            put(bits, indices, values)

        with monkeypatch.context() as patch:
            patch.setattr(edits, "put", failing)
            with pytest.raises(RuntimeError, match="device is gone"):
                handle.swap(files[1])
        assert state_of(model, base) == before
        assert handle.name == "0.lota"
    handle.detach()
    assert state_of(model, base) == on_disk(base)


def test_a_failure_in_the_middle_leaves_what_was_there(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    check_failures(small, monkeypatch)


@pytest.mark.usefixtures("several_threads")
def test_a_failure_in_one_of_several_threads_leaves_what_was_there(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_failures(small, monkeypatch)


# the handle


def test_a_handle_says_what_is_attached(small: Small) -> None:
    model, _, files = small
    handle = attach(model, None)
    assert repr(handle) == "<Attachment on LlamaForCausalLM: nothing is attached>"
    assert (handle.name, handle.digest, handle.entries, handle.bytes_kept) == (None, None, 0, 0)
    seen: list[str | None] = []
    handle.on_change(seen.append)
    handle.swap(files[0])
    digest = TaskVector.open(files[0]).digest
    assert (handle.name, handle.digest) == ("0.lota", digest)
    assert repr(handle).startswith(f"<Attachment on LlamaForCausalLM: '0.lota' ({digest}), ")
    assert attached(model) == [handle]
    with handle.enabled(False):
        assert repr(handle).endswith(", disabled>")
        with handle.enabled(True), handle.enabled(True):
            pass
    handle.swap(files[0])
    handle.detach()
    handle.detach()
    assert attached(model) == []
    handle.swap(files[1])
    assert attached(model) == [handle]
    handle.swap(merge(files))
    handle.detach()
    assert seen.pop() is None
    del seen[-2:]
    assert seen == [digest, None, digest, None, digest, None]


def test_blocks_may_overlap_and_a_vector_may_be_swapped_in_them(small: Small) -> None:
    model, base, files = small
    handle = attach(model, files[0])
    first = state_of(model, base)
    one, other = handle.enabled(False), handle.enabled(False)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert state_of(model, base) == on_disk(base)
    assert handle.digest is None
    with handle.enabled(True):
        assert state_of(model, base) == first
    handle.swap(files[1])
    assert state_of(model, base) == on_disk(base)
    other.__exit__(None, None, None)
    second = state_of(model, base)
    assert handle.digest == TaskVector.open(files[1]).digest
    assert second not in (first, on_disk(base))
    with pytest.raises(UsageError, match="`on` must be"), handle.enabled("no"):  # type: ignore[arg-type]
        pass
    handle.detach()
    assert state_of(model, base) == on_disk(base)


def test_a_hook_that_fails_stops_no_other_one(small: Small) -> None:
    model, base, files = small
    handle = attach(model, files[0])
    seen: list[str | None] = []

    def failing(digest: str | None) -> None:
        raise RuntimeError("no cache")

    handle.on_change(failing)
    handle.on_change(seen.append)
    with pytest.raises(RuntimeError, match="no cache"), handle.enabled(False):
        pass
    assert handle.digest == TaskVector.open(files[0]).digest
    with pytest.raises(RuntimeError, match="no cache"):
        handle.detach()
    assert seen == [None, TaskVector.open(files[0]).digest, None]
    assert attached(model) == []
    assert state_of(model, base) == on_disk(base)
    with handle.enabled(False):  # nothing is attached, so nothing changes
        assert len(seen) == 3
    handle.swap(None)
    assert attached(model) == []


def test_a_vector_that_cannot_be_put_back_is_given_up(small: Small) -> None:
    model, base, files = small
    handle = attach(model, files[0])
    weight = model.model.norm.weight.data
    before = weight.clone()
    block = handle.enabled(False)
    block.__enter__()
    base_weight = weight.clone()
    weight.add_(1)
    with pytest.raises(BaseMismatchError, match="other values than before"):
        block.__exit__(None, None, None)
    assert not torch.equal(before, base_weight)
    assert handle.name is None
    assert attached(model) == []
    weight.copy_(base_weight)
    handle.swap(files[1])
    assert handle.digest == TaskVector.open(files[1]).digest
    assert state_of(model, base) == on_disk(Patched(base, TaskVector.open(files[1])))


def test_hooks_that_swap_see_the_digests_in_their_order(small: Small) -> None:
    model, _, files = small
    handle = attach(model, None)
    seen: list[str | None] = []
    left = [files[1]]

    def swapping(digest: str | None) -> None:
        if left:
            handle.swap(left.pop())

    handle.on_change(swapping)
    handle.on_change(seen.append)
    handle.swap(files[0])
    assert seen[-1] == handle.digest == TaskVector.open(files[1]).digest


def test_a_handle_can_be_given_up(small: Small) -> None:
    """The weights were replaced by those of the base, so nothing is left to restore."""
    model, base, files = small
    handle = attach(model, files[0])
    model.load_state_dict(loaded(base.path).state_dict())
    with pytest.raises(BaseMismatchError, match=r"at \d+ of the \d+ positions that the vector changes.*`forget`"):
        handle.detach()
    handle.forget()
    with attach(model, files[0]):
        assert state_of(model, base) != on_disk(base)
    with pytest.raises(UsageError, match="vector must be a TaskVector"):
        attach(model, None).advance(None)  # type: ignore[arg-type]


def test_the_memory_of_decoded_vectors_can_be_bounded(small: Small) -> None:
    model, _, files = small
    handle = attach(model, files[0], cache_bytes=0)
    handle.swap(files[1])
    assert list(live_state(model).cache) == [handle.digest]
    handle.detach()
    assert not live_state(model).cache
    with pytest.raises(UsageError, match="`cache_bytes` must be at least 0"):
        attach(model, files[0], cache_bytes=-1)


def test_a_model_follows_a_sequence_of_versions(small: Small) -> None:
    model, base, files = small
    tuned = [ModelFolder(file.with_suffix("")) for file in files]
    steps = [diff(base, tuned[0], kind="patch"), diff(*tuned, kind="patch")]
    with attach(model, None) as handle:
        for step, after in zip(steps, tuned, strict=True):
            handle.advance(step)
            assert state_of(model, base) == on_disk(after)
            assert handle.bytes_kept == 0
        with pytest.raises(BaseMismatchError, match="has other values"):
            handle.advance(steps[0])
        handle.swap(diff(tuned[1], base))
        assert state_of(model, base) == on_disk(base)
        with pytest.raises(UsageError, match="is attached to the model: detach it before the weights are advanced"):
            attach(model, None).advance(steps[0])
    assert state_of(model, base) == on_disk(tuned[1])


def test_a_composed_vector_is_attached(small: Small) -> None:
    model, base, files = small
    tuned = [ModelFolder(file.with_suffix("")) for file in files]
    with attach(model, compose(diff(base, tuned[0]), diff(*tuned))):
        assert state_of(model, base) == on_disk(tuned[1])


def test_the_cache_is_bounded_and_forgets_with_the_model(
    small: Small,
) -> None:
    model, _, files = small
    state = live_state(model)
    assert state.limit == CACHE
    with attach(model, files[0]) as handle:
        handle.swap(files[1])
        assert list(state.cache) == [TaskVector.open(file).digest for file in files]
        state.limit = handle.bytes_kept + 1
        handle.swap(files[0])
        assert list(state.cache) == [TaskVector.open(files[0]).digest]
    del state, model
    inner = handle._state._model
    small_model = small[0]
    assert inner() is small_model


def test_threads_that_hold_the_lock_see_whole_swaps(small: Small) -> None:
    model, _, files = small
    ids = torch.arange(6)[None]
    handle = attach(model, files[0])
    wanted = {}
    for file in files:
        handle.swap(file)
        wanted[handle.digest] = model(ids).logits
    found: list[bool] = []

    def generating() -> None:
        for _ in range(30):
            with handle.lock:
                found.append(torch.equal(model(ids).logits, wanted[handle.digest]))

    threads = [threading.Thread(target=generating) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(60):
        handle.swap(files[number % 2])
    for thread in threads:
        thread.join()
    assert len(found) == 60
    assert all(found)


def test_load_attaches_what_it_is_given(small: Small) -> None:
    _, base, files = small
    model = taskvec.load(base.path, files, weights=[1, 0.5], dtype="float32")
    assert state_of(model, base) == on_disk(Patched(base, merge(files, weights=[1, 0.5])))
    (handle,) = attached(model)
    handle.detach()
    assert state_of(model, base) == on_disk(base)
    assert attached(taskvec.load(base.path)) == []
    with pytest.raises(UsageError, match="`weights` has no effect here"):
        taskvec.load(base.path, weights=[1, 2])
    narrow = taskvec.load(base.path, files[0], dtype="bfloat16")
    assert narrow.dtype == torch.bfloat16
    config = json.loads((base.path / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_a_model_is_freed_although_vectors_were_attached(llama: Path, vector: Path) -> None:
    from weakref import ref

    model = loaded(llama)
    handle = attach(model, vector)
    seen = ref(model)
    del model
    gc.collect()
    assert seen() is None
    with pytest.raises(UsageError, match="the model of this handle no longer exists"):
        handle.detach()
