"""Loops of other people: one that trains nothing is refused, and wrappers train what the plain loop trains."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from support.models import WORDS
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer, TrainingArguments

from taskvec import TaskVector, apply, sparse_finetune
from taskvec.errors import BaseMismatchError, TaskvecError, TrainingError, UsageError
from taskvec.models.loading import load_model
from taskvec.models.placement import eligible_parameters
from taskvec.models.sparse_model import SparseModel
from taskvec_formats import ModelFolder

MASK = {"0.weight": np.arange(0, 30, 4), "2.weight": np.arange(1, 24, 5)}
OWN = "holds the model's own parameter '0.weight', which trains by the deltas of tickets: make the optimizer from ticke"
NO_STEP = "nothing was trained: gradients arrived, but no optimizer over tickets"
NO_GRADIENT = "nothing was trained: no gradient reached the masked weights"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))


INPUTS = torch.linspace(-1, 1, 40).view(8, 5)


def loss(model: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return (model(INPUTS) - 1).square().mean()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def steps(model: Any, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def by_model_parameters(model: nn.Module, tickets: SparseModel) -> None:
    steps(tickets, torch.optim.AdamW(model.parameters(), lr=0.1))


def by_both(model: nn.Module, tickets: SparseModel) -> None:
    steps(tickets, torch.optim.SGD([*tickets.parameters(), *model.parameters()], lr=0.1))


def by_hand_over_the_model(model: nn.Module, tickets: SparseModel) -> None:
    for _ in range(3):
        loss(tickets).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad


def by_hand_and_in_vain(model: nn.Module, tickets: SparseModel) -> None:
    by_hand_over_the_model(model, tickets)
    tickets.scatter()


def by_hand_over_deltas(model: nn.Module, tickets: SparseModel) -> None:
    for _ in range(3):
        loss(tickets).backward()
        with torch.no_grad():
            for delta in tickets.parameters():
                assert delta.grad is not None
                delta -= 0.1 * delta.grad
                delta.grad = None


def by_hand_once(model: nn.Module, tickets: SparseModel) -> None:
    loss(tickets).backward()
    for delta in tickets.parameters():
        assert delta.grad is not None
        delta.data -= 0.1 * delta.grad


def by_autograd_alone(model: nn.Module, tickets: SparseModel) -> None:
    weights = [leaf.weight for leaf in tickets.leaves.values()]
    for weight, grad in zip(weights, torch.autograd.grad(loss(tickets), weights), strict=True):
        weight.data -= 0.1 * grad


def by_evaluation_alone(model: nn.Module, tickets: SparseModel) -> None:
    with torch.no_grad():
        loss(tickets)


def without_a_gradient(model: nn.Module, tickets: SparseModel) -> None:
    torch.optim.SGD(tickets.parameters(), lr=0.1).step()


def after_loading(model: nn.Module, tickets: SparseModel) -> None:
    tickets.load_state_dict(tickets.state_dict())
    by_hand_over_the_model(model, tickets)


def without_clearing(model: nn.Module, tickets: SparseModel) -> None:
    optimizer = torch.optim.SGD(tickets.parameters(), lr=0.1)
    for _ in range(2):
        model.zero_grad()
        loss(tickets).backward()
        optimizer.step()


def by_lbfgs(model: nn.Module, tickets: SparseModel) -> None:
    optimizer = torch.optim.LBFGS(tickets.parameters(), lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    optimizer.step(closure)


def with_a_new_parameter(model: Any, tickets: SparseModel) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    loss(tickets)


def with_a_new_parameter_and_no_tickets(model: Any, tickets: SparseModel) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    steps(model, torch.optim.SGD(tickets.parameters(), lr=0.1))


def with_other_data(model: Any, tickets: SparseModel) -> None:
    for parameter in model[2].parameters():
        parameter.data = parameter.data[:2]
    loss(tickets)


@pytest.mark.parametrize(
    ("loop", "error", "message"),
    [
        (by_model_parameters, UsageError, f"^AdamW {OWN}"),
        (by_both, UsageError, f"^SGD {OWN}"),
        (by_hand_over_the_model, TrainingError, NO_STEP),
        (by_hand_and_in_vain, TrainingError, NO_STEP),
        (
            by_hand_over_deltas,
            UsageError,
            r"deltas of parameter '2.weight' were changed, but not .* tickets.scatter\(\)",
        ),
        (by_hand_once, TrainingError, r"parameter '0.weight' is not its base plus its deltas at 8 of 8 masked"),
        (by_autograd_alone, TrainingError, r"parameter '0.weight' is not its base plus its deltas at 8 of 8 masked"),
        (by_evaluation_alone, TrainingError, NO_GRADIENT),
        (without_a_gradient, TrainingError, NO_GRADIENT),
        (after_loading, TrainingError, NO_STEP),
        (without_clearing, UsageError, r"gradient of parameter '2.weight' was not cleared .*, not model.zero_grad\(\)"),
        (by_lbfgs, UsageError, "such as LBFGS, are not supported"),
        (with_a_new_parameter, TrainingError, "parameter '2.weight' of the model was replaced inside the block"),
        (
            with_a_new_parameter_and_no_tickets,
            TrainingError,
            "parameter '2.weight' of the model was replaced inside the block",
        ),
        (with_other_data, TrainingError, "parameter '2.weight' of the model was replaced inside the block"),
    ],
)
def test_a_loop_that_trains_nothing_is_refused(
    loop: Callable[[nn.Module, SparseModel], None], error: type[TaskvecError], message: str
) -> None:
    model = net()
    with pytest.raises(error, match=message), sparse_finetune(model, MASK) as tickets:
        loop(model, tickets)
    # the model is as free as before
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.zero_grad()
    model(INPUTS)[:, :2].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with sparse_finetune(net(), MASK) as tickets:
        steps(tickets, torch.optim.SGD(tickets.parameters(), lr=0.1))


def test_an_optimizer_of_before_or_of_another_block_is_refused() -> None:
    model = net()
    before = torch.optim.Adam(model.parameters())
    with pytest.raises(UsageError, match=f"^Adam {OWN}"), sparse_finetune(model, MASK) as tickets:
        steps(tickets, before)
    with sparse_finetune(model, MASK) as tickets:
        optimizer = torch.optim.SGD(tickets.parameters(), lr=0.1)
        steps(tickets, optimizer)
    with pytest.raises(TrainingError, match=NO_STEP), sparse_finetune(model, MASK) as tickets:
        steps(tickets, optimizer)


def test_a_result_is_not_given_before_there_is_one(tmp_path: Path) -> None:
    model = net()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    with sparse_finetune(model, MASK, ModelFolder(tmp_path / "base.safetensors")) as tickets:
        with pytest.raises(TrainingError, match=NO_GRADIENT):
            tickets.vector()
        loss(model).backward()
        with pytest.raises(TrainingError, match=NO_STEP):
            tickets.entries_by_tensor()
        steps(model, torch.optim.SGD(tickets.parameters(), lr=0.1))
        inside = tickets.vector()
    model.zero_grad()
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1))  # the model is the caller's again
    ours = model[0].weight.detach().clone()
    tickets.to("cpu")
    assert torch.equal(model[0].weight, ours)
    after = tickets.vector()
    assert all(after[name].values.tolist() == inside[name].values.tolist() for name in MASK)
    for delta in tickets.parameters():
        delta.detach().add_(1)
    with pytest.raises(TrainingError, match="is not its base plus its deltas: "):
        tickets.vector()


def test_an_exception_is_not_hidden_by_what_it_prevented() -> None:
    model = net()
    with pytest.raises(ZeroDivisionError), sparse_finetune(model, MASK):
        raise ZeroDivisionError
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradients_from_before_the_block_are_not_stepped_with() -> None:
    """As those of a loss by which the mask was chosen."""
    found = []
    for scale in (0.0, 1000.0):
        model = net()
        (scale * loss(model)).backward()
        with sparse_finetune(model, MASK) as tickets:
            optimizer = torch.optim.SGD(tickets.parameters(), lr=0.1)
            loss(tickets).backward()
            optimizer.step()
            found.append([delta.detach().clone() for delta in tickets.parameters()])
    assert all(torch.equal(one, other) and one.any() for one, other in zip(*found, strict=True))


def test_deltas_that_are_frozen_stay() -> None:
    model = net()
    with sparse_finetune(model, MASK) as tickets:
        frozen, trained = tickets.parameters()
        frozen.requires_grad_(False)
        steps(tickets, torch.optim.AdamW(tickets.parameters(), lr=0.1))
        assert not frozen.any()
        assert trained.any()


def test_after_an_exception_the_model_is_the_caller_s(tmp_path: Path) -> None:
    model, base = net(), tmp_path / "model.safetensors"
    save_file(model.state_dict(), base)
    kept = []

    def interrupted() -> None:
        with sparse_finetune(model, MASK, ModelFolder(base)) as tickets:
            kept.append(tickets)
            steps(tickets, torch.optim.SGD(tickets.parameters(), lr=0.1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    model[0].weight.data.add_(1)
    assert all(entries.values.any() for entries in kept[0].entries_by_tensor().values())


def test_loops_that_train_are_let_through() -> None:
    """Steps too small to be seen, a rest of accumulation, evaluation, steps by hand, skipped ones, other dtypes."""
    model, other = net(), net()
    theirs = torch.optim.AdamW(other.parameters(), lr=0.1)
    with sparse_finetune(model, MASK) as tickets:
        optimizer = torch.optim.SGD(tickets.parameters(), lr=1e-30)
        steps(tickets, optimizer)
        steps(other, theirs)
        assert torch.equal(other[0].weight, theirs.param_groups[0]["params"][0])
        with torch.no_grad():
            loss(tickets)
        optimizer.zero_grad()
        loss(tickets).backward()
    assert torch.equal(model[0].weight, net()[0].weight)
    assert not torch.equal(other[0].weight, net()[0].weight)

    with sparse_finetune(model, MASK) as tickets:
        for _ in range(2):
            tickets.zero_grad()
            loss(tickets).backward()
            with torch.no_grad():
                for delta in tickets.parameters():
                    assert delta.grad is not None
                    delta -= 0.1 * delta.grad
            tickets.scatter()
    assert torch.count_nonzero(model[0].weight != net()[0].weight) == len(MASK["0.weight"])

    with sparse_finetune(model, MASK) as tickets:
        optimizer = torch.optim.SGD(tickets.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in (float("inf"), 1.0):  # the first step is skipped
            optimizer.zero_grad()
            scaler.scale(loss(tickets) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        assert all(delta.any() for delta in tickets.parameters())

    with sparse_finetune(model, MASK) as tickets:
        tickets.bfloat16()
        with torch.no_grad():
            for delta in tickets.parameters():
                delta += 1e-4
        tickets.scatter()
        tickets.float()  # what bf16 rounded away is there again
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO()), AveragedModel]
)
def test_copies_whose_deltas_would_reach_no_model_are_refused(copied: Callable[[nn.Module], object]) -> None:
    with sparse_finetune(net(), MASK) as tickets:
        with pytest.raises(UsageError, match=r"tickets cannot be copied or pickled: copy\.deepcopy\(tickets\.model\)"):
            copied(tickets)
        dense = copy.deepcopy(tickets.model)
        loss(tickets).backward()
        torch.optim.SGD(tickets.parameters(), lr=0.1).step()
    assert not torch.equal(dense[0].weight, tickets.model[0].weight)


def test_after_the_block_deltas_are_not_written() -> None:
    model = net()
    with sparse_finetune(model, MASK) as tickets:
        loss(tickets).backward()
        torch.optim.SGD(tickets.parameters(), lr=0.1).step()
    trained = model[0].weight.clone()
    with torch.no_grad():
        next(tickets.parameters()).add_(1)
    with pytest.raises(UsageError, match="the sparse_finetune block has ended: its deltas are no longer written"):
        tickets.scatter()
    with pytest.raises(UsageError, match="the sparse_finetune block has ended"):
        tickets.load_state_dict(tickets.state_dict())
    assert torch.equal(model[0].weight, trained)


def test_a_block_inside_another_is_refused_and_harms_it_not() -> None:
    model, expected = net(), net()
    with sparse_finetune(expected, MASK) as tickets:
        steps(tickets, torch.optim.SGD(tickets.parameters(), lr=0.1))
    with sparse_finetune(model, MASK) as tickets:
        for inner in (model, model[0], tickets):
            name = next(name for name, _ in inner.named_parameters())
            with (
                pytest.raises(UsageError, match="is in a sparse_finetune block already"),
                sparse_finetune(inner, {name: [0]}),
            ):
                pass
        steps(tickets, torch.optim.SGD(tickets.parameters(), lr=0.1))
    assert torch.equal(model[0].weight, expected[0].weight)


def test_blocks_of_two_models_keep_apart() -> None:
    class Labelled(nn.Linear):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().forward(pixels)

    model, other = net(), Labelled(5, 4)
    with sparse_finetune(model, MASK) as tickets, sparse_finetune(other, {"weight": [1, 7]}) as others:
        steps(tickets, torch.optim.SGD(tickets.parameters(), lr=0.1))
        steps(others, torch.optim.SGD(others.parameters(), lr=0.1))
        assert [type(each).forward.__wrapped__ for each in (tickets, others)] == [  # type: ignore[attr-defined]
            nn.Sequential.forward,
            Labelled.forward,
        ]


def shard_and_run(module: nn.Module, tickets: SparseModel) -> None:
    fully_shard(module)
    loss(tickets)


@pytest.mark.parametrize("when", ["inside", "around"])
def test_parameters_that_are_sharded_in_the_block_are_refused(when: str, alone: None) -> None:
    model = net()
    message = {
        "inside": "parameter '0.weight' of the model was replaced inside the block",
        "around": "the deltas of parameter '0.weight' were replaced, as fully_shard does",
    }[when]
    with pytest.raises(TrainingError, match=message), sparse_finetune(model, MASK) as tickets:
        shard_and_run(model if when == "inside" else tickets, tickets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.to("meta"), "parameter '0.weight' is on the meta device"),
        (lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(5, 6).T)), "'0.weight' is not contiguous"),
        (
            lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(6, 5, dtype=torch.int8), False)),
            "parameter '0.weight' is torch.int8, which cannot be trained",
        ),
    ],
)
def test_parameters_that_cannot_be_trained_are_refused(change: Callable[[nn.Module], object], message: str) -> None:
    model = net()
    change(model)
    with pytest.raises(TrainingError, match=message), sparse_finetune(model, MASK):
        pass


def test_a_resized_embedding_is_refused(llama: Path) -> None:
    model: Any = load_model(llama)[0]
    name = "model.embed_tokens.weight"

    def resize_and_run(tickets: SparseModel) -> None:
        model.resize_token_embeddings(len(WORDS) + 40)
        tickets(input_ids=torch.tensor([[4, 5]]))

    with (
        pytest.raises(TrainingError, match=f"parameter '{name}' of the model was replaced"),
        sparse_finetune(model, {name: [3]}) as tickets,
    ):
        resize_and_run(tickets)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_another_base_is_refused(stored: torch.dtype, held: torch.dtype, tmp_path: Path) -> None:
    model = net()
    state = {name: values.to(stored) for name, values in model.state_dict().items()}
    state["0.weight"].view(-1)[0] = -0.0
    if stored != torch.float8_e4m3fn:
        state["0.weight"].view(-1)[4] = float("nan")
    save_file(state, tmp_path / "base.safetensors")
    base = ModelFolder(tmp_path / "base.safetensors")
    model.load_state_dict({name: values.float() for name, values in state.items()})
    model.to(held)
    with torch.no_grad():
        model[0].weight.view(-1)[0] = 0.0
        model[2].weight.view(-1)[2] += 1  # not masked
    with sparse_finetune(model, MASK, base) as tickets:
        tickets.load_state_dict(tickets.state_dict())
    with torch.no_grad():
        model[2].weight.view(-1)[[1, 6]] += 1
    message = "tensor '2.weight': 2 of 5 masked weights of the model are not those of .*base"
    with pytest.raises(BaseMismatchError, match=message), sparse_finetune(model, MASK, base):
        pass


def test_a_trainer_of_the_model_itself_is_refused(llama: Path, tmp_path: Path) -> None:
    model, _ = load_model(llama)
    masks = {name: np.arange(3) for name in eligible_parameters(model)}
    row = {"input_ids": [4, 5, 6], "labels": [4, 5, 6]}
    with (
        pytest.raises(UsageError, match=r"^AdamW holds the model's own parameter 'model.* Trainer model=tickets"),
        sparse_finetune(model, masks),
    ):
        Trainer(model=model, args=arguments(tmp_path), train_dataset=[row] * 4).train()  # type: ignore[arg-type]


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )


def test_trainer_and_save_pretrained_save_the_same(llama: Path, tmp_path: Path) -> None:
    """The deltas; the dense model and the vector are saved by themselves and agree with them."""
    base = ModelFolder(llama)
    model: Any = load_model(llama)[0]
    masks = {name: np.arange(3) for name in eligible_parameters(model)}
    row = {"input_ids": [4, 5, 6], "labels": [4, 5, 6]}
    with sparse_finetune(model, masks, base) as tickets:
        trainer = Trainer(model=tickets, args=arguments(tmp_path / "run"), train_dataset=[row] * 4)  # type: ignore[arg-type]
        trainer.train()
        trainer.save_model(str(tmp_path / "trainer"))
        tickets.save_pretrained(tmp_path / "own", max_shard_size="1GB")
        tickets.save_pretrained(tmp_path / "nobody", is_main_process=False)
        tickets.model.save_pretrained(tmp_path / "dense")
        tickets.vector().save(tmp_path / "x.lota")
        for push in (lambda: tickets.push_to_hub("me/x"), lambda: tickets.save_pretrained("x", push_to_hub=True)):
            with pytest.raises(UsageError, match="tickets cannot be pushed to the Hub"):
                push()
    saved, own = (load_file(tmp_path / name / "model.safetensors") for name in ("trainer", "own"))
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[key], own[key]) for key in own)
    assert {path.name for path in (tmp_path / "own").iterdir()} == {"model.safetensors"}
    assert not (tmp_path / "nobody").exists()

    again, _ = load_model(llama)
    with sparse_finetune(again, masks, base) as tickets:
        tickets.load_state_dict(own)
    apply(TaskVector.open(tmp_path / "x.lota"), base, tmp_path / "applied")
    for folder in ("dense", "applied"):
        dense = type(model).from_pretrained(tmp_path / folder)
        for name, parameter in dense.named_parameters():
            assert torch.equal(parameter, again.get_parameter(name)), (folder, name)
    assert any(
        not torch.equal(p, q) for p, q in zip(again.parameters(), load_model(llama)[0].parameters(), strict=True)
    )


def trained(model: nn.Module, wrap: Callable[[SparseModel, torch.optim.Optimizer], tuple[Any, Any]]) -> SparseModel:
    """Three steps of a wrapped model; after them the masked weights are base + delta, and no others moved."""
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with sparse_finetune(model, MASK) as tickets:
        wrapped, optimizer = wrap(tickets, torch.optim.AdamW(tickets.parameters(), lr=0.1))
        steps(wrapped, optimizer)
    for name, parameter in model.named_parameters():
        expected = start[name].view(-1).clone()
        if name in MASK:
            expected[MASK[name]] += tickets.leaves[name].delta.detach()
            assert not torch.equal(expected, start[name].view(-1))
        assert torch.equal(parameter.detach().view(-1), expected), name
    return tickets


def plain() -> SparseModel:
    return trained(net(), lambda tickets, optimizer: (tickets, optimizer))


@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        "aot_eager",
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(
                not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
            ),
        ),
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["tickets", "model"])
def test_compiled_models_train_the_masked_weights(backend: str, whole: bool) -> None:
    torch.compiler.reset()
    found = trained(
        net(),
        lambda tickets, optimizer: (torch.compile(tickets if whole else tickets.model, backend=backend), optimizer),
    )
    for one, other in zip(found.parameters(), plain().parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_accelerate_trains_the_same_bits() -> None:
    accelerator = Accelerator(cpu=True)
    found = trained(net(), accelerator.prepare)
    for one, other in zip(found.parameters(), plain().parameters(), strict=True):
        assert torch.equal(one, other)


def test_distributed_data_parallel_trains_the_same_bits(alone: None) -> None:
    found = trained(net(), lambda tickets, optimizer: (DistributedDataParallel(tickets), optimizer))
    for one, other in zip(found.parameters(), plain().parameters(), strict=True):
        assert torch.equal(one, other)
