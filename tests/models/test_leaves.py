"""Sparse leaves: they train what a dense mask would, in anybody's loop, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import ROWS, WORDS, make_architecture, make_tokenizer
from torch import nn
from transformers import Trainer, TrainingArguments

from taskvec import TaskVector, apply, diff, sparse_finetune
from taskvec.data.examples import read_examples
from taskvec.data.rows import collate, encode
from taskvec.errors import BaseMismatchError, MaskError, UsageError
from taskvec.models.loading import load_model
from taskvec.models.placement import bits_of, eligible_parameters, part_of, places
from taskvec_formats import ModelFolder


@pytest.mark.parametrize("make", [torch.optim.RMSprop, torch.optim.AdamW, torch.optim.SGD])
def test_leaves_train_what_a_dense_mask_trains(make: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    start = torch.randn(6, 5)
    inputs, target = torch.randn(2, 4, 5), torch.randn(2, 4, 6)
    mask = np.flatnonzero(np.arange(30) % 3 == 1)

    # the dense reference: delta is a full matrix whose gradient is masked
    keep = torch.zeros(30, dtype=torch.bool)
    keep[mask] = True
    delta = nn.Parameter(torch.zeros(6, 5))
    delta.register_hook(lambda grad: grad * keep.view(6, 5))
    reference = make([delta], lr=0.05)

    model = nn.Linear(5, 6, bias=False)
    model.weight.data.copy_(start)
    with sparse_finetune(model, {"weight": mask}) as leaves:
        optimizer = make(leaves.parameters(), lr=0.05)
        for _ in range(5):
            for x, y in zip(inputs, target, strict=True):  # two backward passes a step: gradients accumulate
                (model(x) - y).square().mean().backward()
                (x @ (start + delta).T - y).square().mean().backward()
            assert model.weight.grad is None, "the dense gradient was kept"
            optimizer.step()
            reference.step()
            optimizer.zero_grad()
            reference.zero_grad()
    torch.testing.assert_close(model.weight.detach(), (start + delta).detach())
    assert torch.equal(model.weight.view(-1)[~keep], start.view(-1)[~keep])
    assert not torch.equal(model.weight.view(-1)[keep], start.view(-1)[keep])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("make", [torch.optim.RMSprop, torch.optim.AdamW, torch.optim.SGD])
def test_accumulation_and_checkpointing_train_the_masked_weights_and_no_others(
    make: type[torch.optim.Optimizer], checkpointing: bool, llama: Path, data: Path
) -> None:
    """Two batches a step: the leaves' gradients are those of a dense backward pass, and no dense one stays."""
    model, _ = load_model(llama)
    rows = [encode(example, make_tokenizer(None), 64) for example in read_examples(data)]
    batches = [collate(part, 0, frozenset()) for part in (rows[:2], rows[2:])]
    chosen = eligible_parameters(model)
    masks = {name: np.arange(number, p.numel(), 7) for number, (name, p) in enumerate(chosen.items())}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for batch in batches:
        model(**batch).loss.backward()
    dense = {name: p.grad.view(-1)[masks[name]] for name, p in chosen.items() if p.grad is not None}
    assert dense.keys() == masks.keys()
    model.zero_grad(set_to_none=True)

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with sparse_finetune(model, masks) as leaves:
        optimizer = make(leaves.parameters(), lr=1e-3)
        for step in range(3):
            for batch in batches:
                model(**batch).loss.backward()
                assert all(p.grad is None for p in model.parameters())
            if step == 0:
                for name, leaf in leaves.leaves.items():
                    torch.testing.assert_close(leaf.delta.grad, dense[name])
            torch.nn.utils.clip_grad_norm_(leaves.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        changed = torch.nonzero((parameter.detach() != before[name]).view(-1)).view(-1).numpy()
        assert np.isin(changed, masks.get(name, [])).all(), f"{name} changed outside the mask"
        assert name not in masks or len(changed)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_leaves_hold_what_the_file_will_give(stored: torch.dtype, held: torch.dtype, tmp_path: Path) -> None:
    """Training in one dtype sees the rounding of the dtype in which the base is stored."""
    torch.manual_seed(0)
    weight = torch.randn(30, 40).to(stored)
    weight[0, :7] = torch.tensor([0.0, -0.0, 1e-30, -1e-8, 60000.0, 1.0, -1.0]).to(stored)
    save_file({"weight": weight}, tmp_path / "base.safetensors")
    base = ModelFolder(tmp_path / "base.safetensors")
    model = nn.Linear(40, 30, bias=False, dtype=held)
    model.weight.data.copy_(weight)
    mask = np.arange(0, 1200, 7)
    with sparse_finetune(model, {"weight": mask}, base) as tickets:
        optimizer = torch.optim.SGD(tickets.parameters(), lr=0.01)
        for _ in range(3):
            model(torch.randn(4, 40, dtype=held)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        tickets.vector().save(tmp_path / "x.lota")
    apply(TaskVector.open(tmp_path / "x.lota"), base, tmp_path / "out")
    tuned = load_file(tmp_path / "out" / "base.safetensors")["weight"]
    assert torch.equal(tuned.to(held), model.weight.detach())
    unmasked = np.setdiff1d(np.arange(1200), mask)
    assert torch.equal(tuned.view(-1)[unmasked], weight.view(-1)[unmasked])
    assert not torch.equal(tuned, weight)


def test_leaving_restores_the_model_s_settings() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].bias.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with sparse_finetune(model, {"1.weight": np.array([0, 4])}) as tickets:
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {"1.weight"}
        tickets.load_state_dict(tickets.state_dict())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    model(torch.ones(1, 3)).sum().backward()
    assert model[1].weight.grad is not None, "the hook outlived the block"


def test_masks_that_do_not_fit_are_refused(llama: Path) -> None:
    model, _ = load_model(llama)  # its embeddings are tied
    tied = {"model.embed_tokens.weight": np.array([0]), "lm_head.weight": np.array([1])}
    q = "model.layers.0.self_attn.q_proj.weight"
    for masks, message in (
        (tied, "'model.embed_tokens.weight' and 'lm_head.weight' are the same parameter"),
        ({"absent.weight": np.array([0])}, "no parameter 'absent.weight'"),
        ({q: np.array([1024])}, "increasing positions below 1024"),
        ({q: np.array([3, 3])}, "increasing positions below 1024"),
        ({q: np.array([-1, 3])}, "increasing positions below 1024"),
        ({q: np.array([], np.int64)}, "no position"),
    ):
        with pytest.raises(MaskError, match=message), sparse_finetune(model, masks):
            pass


def test_a_tied_weight_is_trained_once(llama: Path) -> None:
    """The gradient of the embedding's and of the head's use add up in one leaf."""
    model, _ = load_model(llama)
    batch = collate([encode(ROW, make_tokenizer(None), 64) for ROW in read_rows()], 0, frozenset())
    model(**batch).loss.backward()
    mask = np.arange(0, model.lm_head.weight.numel(), 3)
    expected = model.lm_head.weight.grad.view(-1)[mask].clone()
    model.zero_grad(set_to_none=True)
    with sparse_finetune(model, {"lm_head.weight": mask}, ModelFolder(llama)) as tickets:
        tickets(**batch).loss.backward()
        (delta,) = tickets.parameters()
        torch.testing.assert_close(delta.grad, expected)
        torch.optim.SGD([delta], lr=1e-3).step()
        assert list(tickets.vector()) == ["model.embed_tokens.weight"]


def read_rows() -> list[Any]:
    from taskvec.data.examples import Example

    return [Example(({"role": "user", "content": row["prompt"]},), row["completion"], "") for row in ROWS[:2]]


def test_a_base_that_is_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    bert = ModelFolder(make_architecture("bert", tmp_path / "bert", dtype="float32"))
    model, _ = load_model(llama)
    name = "model.layers.0.self_attn.q_proj.weight"
    with (
        pytest.raises(BaseMismatchError, match="bert has no tensor for parameter 'model"),
        sparse_finetune(model, {name: np.array([0])}, bert),
    ):
        pass
    with sparse_finetune(model, {name: np.array([0])}) as tickets:
        with pytest.raises(UsageError, match="a task vector needs its base"):
            tickets.vector()
        tickets.load_state_dict(tickets.state_dict())


def test_a_vector_s_mask_can_be_trained_in_any_loop(llama: Path, tuned: Path, tmp_path: Path) -> None:
    base = ModelFolder(llama)
    diff(base, ModelFolder(tuned), sparsity=0.9).save(tmp_path / "mask.lota")
    mask = TaskVector.open(tmp_path / "mask.lota")
    model, _ = load_model(llama)
    batch = collate([encode(row, make_tokenizer(None), 64) for row in read_rows()], 0, frozenset())
    with sparse_finetune(model, mask, base) as tickets:
        optimizer = torch.optim.AdamW(tickets.parameters(), lr=1e-2)
        tickets(**batch).loss.backward()
        optimizer.step()
        trained = tickets.vector({"task": "sums"})
    assert trained.provenance == {"made_by": "sparse_finetune", "task": "sums"}
    for name in trained:
        assert trained[name].indices.tolist() == mask[name].indices.tolist()


class Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """What any user has: token ids and labels."""

    def __init__(self, data: Path) -> None:
        self.rows = [encode(example, make_tokenizer(None), 64) for example in read_examples(data)] * 3

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def trained_by_trainer(model_folder: Path, data: Path, folder: Path, stop: int = 6, *, resume: bool = False) -> bytes:
    """transformers' Trainer with its own optimizer and schedule; the saved vector's bytes."""
    base = ModelFolder(model_folder)
    model, _ = load_model(model_folder)
    chosen = eligible_parameters(model)
    masks = {name: np.arange(number, p.numel(), 7) for number, (name, p) in enumerate(chosen.items())}
    untouched = {name: p.detach().clone() for name, p in model.named_parameters()}
    with sparse_finetune(model, masks, base) as tickets:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=stop,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            weight_decay=0.1,
            lr_scheduler_type="constant",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        rows = Rows(data)
        trainer = Trainer(
            model=tickets,
            args=arguments,
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=lambda batch: collate(batch, 0, frozenset()),
        )
        trainer.train(resume_from_checkpoint=resume)
        evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert evaluated[-1] < evaluated[0]
        tickets.vector().save(folder / "x.lota", force=True)
    for name, parameter in model.named_parameters():
        changed = torch.nonzero((parameter.detach() != untouched[name]).view(-1)).view(-1).numpy()
        assert np.isin(changed, masks.get(name, [])).all(), f"{name} changed outside the mask"
        assert name not in masks or len(changed) > len(masks[name]) / 2
    return (folder / "x.lota").read_bytes()


def test_transformers_own_trainer_trains_a_ticket(llama: Path, data: Path, tmp_path: Path) -> None:
    """Unmodified; its checkpoints are as small as the entries; going on from one gives the same bits."""
    whole = trained_by_trainer(llama, data, tmp_path / "whole")
    trained_by_trainer(llama, data, tmp_path / "parts", stop=4)
    assert trained_by_trainer(llama, data, tmp_path / "parts", resume=True) == whole
    saved = load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors")
    digest = saved.pop("_extra_state")
    assert len(digest) == 32
    model, _ = load_model(llama)
    entries = sum(len(range(n, p.numel(), 7)) for n, p in enumerate(eligible_parameters(model).values()))
    assert sum(delta.numel() for delta in saved.values()) == entries


def test_a_checkpoint_of_another_mask_is_refused(llama: Path) -> None:
    model, _ = load_model(llama)
    name = "model.layers.0.self_attn.q_proj.weight"
    with sparse_finetune(model, {name: np.array([1, 2])}) as tickets:
        state = {key: value.clone() for key, value in tickets.state_dict().items()}
        tickets.load_state_dict(state)
    for other, message in (
        (state, "another mask"),
        ({key: value for key, value in state.items() if "deltas" in key}, "no '_extra_state'"),
        (model.state_dict(), "does not belong to this mask"),
    ):
        with (
            pytest.raises(MaskError, match=message),
            sparse_finetune(model, {name: np.array([1, 3])}) as tickets,
        ):
            tickets.load_state_dict(other, strict=False)
    with sparse_finetune(model, {name: np.array([1, 2])}) as tickets:
        before = model.get_parameter(name).detach().clone().view(-1)
        state[next(key for key in state if "deltas" in key)] += 0.5
        tickets.load_state_dict(state)
        after = model.get_parameter(name).detach().view(-1)
        assert torch.equal(after[1:3], before[1:3] + 0.5), "what was loaded is not in the model"


def test_mixed_precision_trains_leaves_in_f32(llama: Path, data: Path) -> None:
    """bf16 weights and autocast both come near the f32 trajectory, although a step is below bf16's resolution."""
    found = {}
    for kind in ("f32", "autocast", "bf16"):
        model, _ = load_model(llama, torch.bfloat16 if kind == "bf16" else torch.float32)
        chosen = eligible_parameters(model)
        masks = {name: np.arange(number, p.numel(), 7) for number, (name, p) in enumerate(chosen.items())}
        batch = collate(Rows(data).rows[:2], 0, frozenset())
        with sparse_finetune(model, masks) as tickets:
            assert {p.dtype for p in tickets.parameters()} == {torch.float32}
            optimizer = torch.optim.SGD(tickets.parameters(), lr=1e-4)
            for _ in range(3):
                with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                    tickets(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            found[kind] = torch.cat([p.detach().clone() for p in tickets.parameters()])
    assert found["f32"].abs().max() > 0
    for kind in ("autocast", "bf16"):
        difference = (found[kind] - found["f32"]).norm() / found["f32"].norm()
        assert difference < 0.1, f"{kind}: {difference}"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "bert"])
def test_every_tensor_on_disk_has_its_place_in_the_model(architecture: str, tmp_path: Path, gpt2: Path) -> None:
    """Prefixes, tied weights, and experts that several tensors on disk make up."""
    folder = gpt2 if architecture == "gpt2" else make_architecture(architecture, tmp_path, dtype="float32")
    base = ModelFolder(folder)
    model, _ = load_model(folder)
    placed = places(model, {name: info.form for name, info in base.tensors.items()})
    assert placed.keys() == base.tensors.keys()
    for name, info in base.tensors.items():
        assert np.array_equal(bits_of(info.dtype, part_of(model, placed[name], info.form.size)), base.bits(name)), name
    covered = {place.parameter for place in placed.values()}
    assert covered == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("architecture", ["mixtral", "bert"])
def test_experts_and_encoders_train_in_any_loop(architecture: str, tmp_path: Path) -> None:
    folder = make_architecture(architecture, tmp_path / "base", dtype="float32")
    base = ModelFolder(folder)
    model, _ = load_model(folder)
    chosen = eligible_parameters(model)
    masks = {name: np.arange(0, p.numel(), 5) for name, p in chosen.items()}
    ids = torch.randint(4, len(WORDS), (2, 12), generator=torch.Generator().manual_seed(0))
    with sparse_finetune(model, masks, base) as tickets:
        optimizer = torch.optim.RMSprop(tickets.parameters(), lr=1e-3)
        for _ in range(2):
            tickets(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        tickets.vector().save(tmp_path / "x.lota")
    vector = TaskVector.open(tmp_path / "x.lota")
    if architecture == "mixtral":
        assert sum("experts" in name for name in vector) == 2 * 4 * 3
    assert vector.eligible == sum(p.numel() for p in chosen.values())
    apply(vector, base, tmp_path / "out")
    again, _ = load_model(tmp_path / "out")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
