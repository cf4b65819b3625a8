"""Masks that change during training: the rule itself, and training beside a dense oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import make_architecture
from torch import nn
from transformers import Trainer, TrainingArguments

from taskvec import apply, sparse_finetune
from taskvec.errors import BaseMismatchError, MaskError, UsageError
from taskvec.models import regrowth as module
from taskvec.models.loading import load_model
from taskvec.models.placement import eligible_parameters
from taskvec.models.regrowth import chosen, largest, regrown
from taskvec_formats import ModelFolder

# few different values, so that many are equal
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 1e-40, 3e4])


@given(st.lists(NUMBERS, max_size=40), st.integers(1, 12), st.sets(st.integers(0, 39)), st.integers(1, 9))
def test_the_largest_are_found_block_by_block(numbers: list[float], k: int, taken: set[int], block: int) -> None:
    excluded = sorted(place for place in taken if place < len(numbers))
    free = [place for place in range(len(numbers)) if numbers[place] and place not in excluded]
    expected = sorted(sorted(free, key=lambda place: (-abs(numbers[place]), place))[:k])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        found = largest(torch.tensor(numbers, dtype=torch.float32), k, torch.tensor(excluded, dtype=torch.int64))
    assert found.tolist() == expected


def test_gradients_that_are_not_numbers_come_first() -> None:
    values = torch.tensor([1.0, np.nan, -np.inf, 2.0, np.inf])
    assert largest(values, 2).tolist() == [1, 2]
    assert largest(values.bfloat16(), 4).tolist() == [1, 2, 3, 4]
    assert largest(values[:0], 2).tolist() == []


def regrown_naively(mask: dict[int, float], candidates: dict[int, float], count: int) -> tuple[set[int], set[int]]:
    """The rule in words: what is dropped and what is grown, without what is both."""
    dropped = sorted(mask, key=lambda place: (abs(mask[place]), place))[:count]
    remaining = mask.keys() - set(dropped)
    able = [place for place in candidates if candidates[place] and place not in remaining]
    grown = sorted(able, key=lambda place: (-abs(candidates[place]), place))[:count]
    leaving = [place for place in dropped if place not in grown]
    entering = [place for place in grown if place not in mask]
    return set(leaving[: len(entering)]), set(entering)


@given(
    st.dictionaries(st.integers(0, 30), NUMBERS, min_size=1, max_size=20),
    st.dictionaries(st.integers(0, 30), NUMBERS, max_size=20),
    st.integers(0, 20),
)
def test_a_change_is_the_rule(mask: dict[int, float], candidates: dict[int, float], count: int) -> None:
    """k stays the same, positions are increasing and distinct, and equal values are taken in their order."""
    mask, candidates = dict(sorted(mask.items())), dict(sorted(candidates.items()))
    count = min(count, len(mask))
    after = regrown(
        torch.tensor(list(mask), dtype=torch.int32),
        torch.tensor(list(mask.values())),
        torch.tensor(list(candidates), dtype=torch.int32),
        torch.tensor(list(candidates.values())),
        count,
    )
    assert after.dtype == torch.int32
    found = after.tolist()
    assert len(found) == len(mask)
    assert found == sorted(set(found))
    left, came = regrown_naively(mask, candidates, count)
    assert set(found) == mask.keys() - left | came
    assert len(came) <= count


class Dense:
    """The oracle: whole matrices of deltas, masks as arrays, and a plain optimizer of masked gradients."""

    def __init__(self, model: nn.Module, masks: dict[str, np.ndarray], make: Callable[..., Any], **rule: Any) -> None:
        self.start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.masks = {}
        for name, places in masks.items():
            self.masks[name] = torch.zeros(self.start[name].numel(), dtype=torch.bool)
            self.masks[name][places] = True
        self.deltas = {name: nn.Parameter(torch.zeros_like(self.start[name]).view(-1)) for name in masks}
        self.optimizer = make(self.deltas.values())
        self.rule = rule
        self.done = 0
        self.candidates: dict[str, torch.Tensor] = {}
        self.seen: dict[str, list[torch.Tensor]] = {}

    def weights(self) -> dict[str, torch.Tensor]:
        """Dense weights: the base, and base + delta where the mask is."""
        found = dict(self.start)
        for name, delta in self.deltas.items():
            flat = found[name].view(-1)
            found[name] = torch.where(self.masks[name], flat + delta.detach(), flat).view_as(found[name])
        return found

    def step(self, passes: list[dict[str, torch.Tensor]], clip: float) -> None:
        """A step, given the dense gradients of each backward pass."""
        every, total, window = (self.rule[key] for key in ("every", "total", "window"))
        change = (self.done // every + 1) * every
        watching = change < total and self.done >= change - window
        for name, delta in self.deltas.items():
            delta.grad = sum(each[name].view(-1) for each in passes) * self.masks[name]
        before = {name: delta.grad[self.masks[name]].norm() for name, delta in self.deltas.items()}
        # as with the leaves: the norm of the entries alone
        entries = [nn.Parameter(delta[self.masks[name]].detach()) for name, delta in self.deltas.items()]
        for entry, (name, delta) in zip(entries, self.deltas.items(), strict=True):
            entry.grad = delta.grad[self.masks[name]].clone()
        nn.utils.clip_grad_norm_(entries, clip)
        for entry, (name, delta) in zip(entries, self.deltas.items(), strict=True):
            delta.grad[self.masks[name]] = entry.grad
            if watching:
                if name not in self.candidates:
                    first = passes[0][name].view(-1).clone()
                    first[self.rule["excluded"].get(name, [])] = 0
                    order = sorted(range(len(first)), key=lambda place: (-abs(float(first[place])), place))
                    count = min(int(self.masks[name].sum()), int(first.count_nonzero()))
                    self.candidates[name] = torch.tensor(sorted(order[:count]))
                    self.seen[name] = []
                scale = entry.grad.norm() / before[name]
                gradient = sum(each[name].view(-1)[self.candidates[name]] for each in passes)
                self.seen[name].append(gradient * scale)
        self.optimizer.step()
        self.done += 1
        if self.done % every == 0 and self.done < total:
            for name in self.deltas:
                self._change(name, total)
            self.candidates.clear()

    def _change(self, name: str, total: int) -> None:
        mask, delta, candidates = self.masks[name], self.deltas[name], self.candidates[name].tolist()
        sums, squares = torch.zeros(len(candidates)), torch.zeros(len(candidates))
        for gradient in self.seen[name]:
            sums, squares = sums + gradient, squares + gradient * gradient
        count = int(mask.sum()) * self.rule["tenths"] * (total - self.done) // (10 * total)
        left, came = regrown_naively(
            {place: float(delta.data[place]) for place in mask.nonzero().view(-1).tolist()},
            dict(zip(candidates, sums.tolist(), strict=True)),
            count,
        )
        assert left, "the test changes nothing"
        state = self.optimizer.state[delta]
        steps, betas = float(state.get("step", 0)), self.optimizer.param_groups[0].get("betas", (0, 0))
        for place in left:
            mask[place] = False
        for place in came:
            mask[place] = True
            number = candidates.index(place)
            mean, square = sums[number] / len(self.seen[name]), squares[number] / len(self.seen[name])
            seeds = {
                "exp_avg": mean * (1 - betas[0] ** steps),
                "exp_avg_sq": square * (1 - betas[1] ** steps),
                "square_avg": square,
            }
            delta.data[place] = 0
            for key, value in state.items():
                if value.dim():
                    value[place] = seeds.get(key, 0)


class Nested(torch.optim.SGD):
    """torch calls the hooks of an optimizer twice for such a step once an SGD was made."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)


torch.optim.SGD([nn.Parameter(torch.zeros(1))])
MAKERS = {
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=3e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=3e-2),
    "nested": lambda parameters: Nested(parameters, lr=3e-2),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=3e-2, momentum=0.9),
}


def small() -> tuple[nn.Sequential, list[list[tuple[torch.Tensor, torch.Tensor]]], dict[str, np.ndarray]]:
    """A model, batches for twelve steps of two backward passes, and a mask."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 7, bias=False))
    steps = [[(torch.randn(5, 8), torch.randn(5, 7)) for _ in range(2)] for _ in range(12)]
    return model, steps, {"0.weight": np.arange(1, 96, 3), "2.weight": np.arange(0, 84, 4)}


@pytest.mark.parametrize("clip", [0.05, 1e9])
@pytest.mark.parametrize("kind", MAKERS)
def test_training_is_that_of_a_dense_oracle(kind: str, clip: float) -> None:
    """The same positions and values after every step, with accumulation and clipping."""
    model, steps, masks = small()
    excluded = {"0.weight": np.arange(0, 60, 3)}
    oracle = Dense(model, masks, MAKERS[kind], every=3, total=12, window=2, tenths=6, excluded=excluded)
    seen = set()
    with sparse_finetune(model, masks) as tickets:
        optimizer = MAKERS[kind](tickets.parameters())
        regrowth = tickets.regrow(optimizer, total_steps=12, every=3, window=2, share=0.6, excluded={**excluded})
        for step in steps:
            passes = []
            for inputs, targets in step:
                weights = {name: value.clone().requires_grad_() for name, value in oracle.weights().items()}
                loss = (torch.func.functional_call(model, weights, inputs) - targets).square().sum()
                gradients = torch.autograd.grad(loss, list(weights.values()))
                passes.append(dict(zip(weights, gradients, strict=True)))
                (tickets(inputs) - targets).square().sum().backward()
            nn.utils.clip_grad_norm_(tickets.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            oracle.step(passes, clip)
            expected = oracle.weights()
            for name, leaf in tickets.leaves.items():
                assert torch.equal(leaf.indices.long(), oracle.masks[name].nonzero().view(-1)), name
                torch.testing.assert_close(leaf.values, oracle.deltas[name].detach()[oracle.masks[name]])
                torch.testing.assert_close(leaf.weight.detach(), expected[name])
                outside = ~oracle.masks[name]
                assert torch.equal(leaf.weight.detach().view(-1)[outside], oracle.start[name].view(-1)[outside])
                seen.add((name, tuple(leaf.indices.tolist())))
        assert regrowth.replaced > 0
    assert len(seen) == 8  # three changes of each parameter
    assert not np.isin(tickets.leaves["0.weight"].indices.numpy(), excluded["0.weight"]).any()


@pytest.mark.parametrize("kind", ["adam", "rmsprop", "momentum"])
def test_a_mask_may_be_chosen_again_by_scores_of_the_weights(kind: str) -> None:
    """The largest scores of the current weights, without excluded ones; what stays keeps its delta and its moments."""
    model, steps, masks = small()
    excluded = {"0.weight": np.arange(0, 60, 3)}
    start = {name: parameter.detach().clone().view(-1) for name, parameter in model.named_parameters()}
    with sparse_finetune(model, masks) as tickets:
        optimizer = MAKERS[kind](tickets.parameters())
        given = []

        def scores(name: str, weight: torch.Tensor) -> torch.Tensor:
            given.append((name, weight.clone()))
            return (weight - weight.mean()).square()

        regrowth = tickets.regrow(optimizer, total_steps=6, every=2, excluded=excluded, scores=scores)
        for step in steps[:6]:
            for inputs, targets in step:
                (tickets(inputs) - targets).square().sum().backward()
            before = {name: (leaf.indices.tolist(), leaf.base) for name, leaf in tickets.leaves.items()}
            given.clear()
            optimizer.step()
            optimizer.zero_grad()
            assert [name for name, _ in given] == (list(masks) if regrowth.done in (2, 4) else [])
            for name, weight in given:
                leaf, flat = tickets.leaves[name], weight.view(-1)
                score = (flat - weight.mean()).square()
                score[excluded.get(name, [])] = 0
                assert leaf.indices.tolist() == sorted(score.argsort(descending=True)[: len(leaf.indices)].tolist())
                stays = torch.isin(leaf.indices, torch.tensor(before[name][0], dtype=torch.int32))
                assert 0 < stays.sum() < len(stays)
                places = leaf.indices.long()
                assert torch.equal(leaf.weight.detach().view(-1)[places[stays]], flat[places[stays]])
                assert not leaf.values[~stays].any()
                for state in optimizer.state[leaf.delta].values():
                    if state.dim():
                        assert not state[~stays].any()
                        assert state[stays].any() or kind == "adam"  # amsgrad
        for name, leaf in tickets.leaves.items():
            assert len(leaf.indices) == len(masks[name])
            outside = torch.ones(len(start[name]), dtype=torch.bool)
            outside[leaf.indices.long()] = False
            assert torch.equal(leaf.weight.detach().view(-1)[outside], start[name][outside])


@given(
    st.sets(st.integers(0, 15), min_size=1),
    st.lists(NUMBERS, min_size=16, max_size=16),
    st.sets(st.integers(0, 15)),
)
def test_scores_of_zero_leave_the_mask_as_it_is(mask: set[int], numbers: list[float], taken: set[int]) -> None:
    free = [place for place in range(16) if numbers[place] and place not in taken]
    best = sorted(free, key=lambda place: (-abs(numbers[place]), place))[: len(mask)]
    rest = [place for place in sorted(mask) if place not in best][: len(mask) - len(best)]
    scores = torch.tensor(numbers, dtype=torch.float32).view(4, 4)
    found = chosen(torch.tensor(sorted(mask), dtype=torch.int32), scores, torch.tensor(sorted(taken)).long())
    assert found.tolist() == sorted([*best, *rest])


def trained(path: Path | None, stop: int, kind: str) -> dict[str, torch.Tensor]:
    """Twelve steps, or those up to `stop`, from the checkpoint of an earlier part if there is one."""
    model, steps, masks = small()
    with sparse_finetune(model, masks) as tickets:
        optimizer = MAKERS[kind](tickets.parameters())
        regrowth = tickets.regrow(optimizer, total_steps=12, every=4, window=3, share=0.6)
        begin = 0
        if path is not None and path.exists():
            state = torch.load(path, weights_only=True)
            tickets.load_state_dict(state["tickets"])
            optimizer.load_state_dict(state["optimizer"])
            begin = regrowth.done
        for step in steps[begin:stop]:
            for inputs, targets in step:
                (tickets(inputs) - targets).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if path is not None:
            torch.save({"tickets": tickets.state_dict(), "optimizer": optimizer.state_dict()}, path)
        return {"replaced": torch.tensor(regrowth.replaced), **{k: v.clone() for k, v in model.state_dict().items()}}


def trained_by_trainer(model_folder: Path, folder: Path, stop: int, *, resume: bool = False) -> dict[str, torch.Tensor]:
    """transformers' Trainer, unmodified."""
    model, _ = load_model(model_folder)
    masks = {name: np.arange(0, p.numel(), 9) for name, p in eligible_parameters(model).items()}
    rows = [{"input_ids": [n, 6, 7, n], "labels": [n, 6, 7, n]} for n in range(1, 9)]
    with sparse_finetune(model, masks) as tickets:
        optimizer = torch.optim.AdamW(tickets.parameters(), lr=1e-2)
        tickets.regrow(optimizer, total_steps=8, every=3, window=2, share=0.5)
        arguments = TrainingArguments(
            str(folder),
            max_steps=stop,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_steps=2,
            lr_scheduler_type="constant",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        optimizers = (optimizer, None)
        trainer = Trainer(model=tickets, args=arguments, train_dataset=rows, optimizers=optimizers)  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=resume)
        assert tickets.regrowth is not None
        assert tickets.regrowth.done == stop
        assert tickets.regrowth.replaced > 0
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.slow
def test_transformers_own_trainer_resumes_a_mask_that_changes(llama: Path, tmp_path: Path) -> None:
    whole = trained_by_trainer(llama, tmp_path / "whole", 8)
    trained_by_trainer(llama, tmp_path / "parts", 4)
    found = trained_by_trainer(llama, tmp_path / "parts", 8, resume=True)
    for name, values in whole.items():
        assert torch.equal(found[name], values), name


@pytest.mark.parametrize("stop", [2, 4, 7])
def test_a_loop_that_was_interrupted_continues_to_the_same_bits(stop: int, tmp_path: Path) -> None:
    """Also in the middle of a window."""
    whole = trained(None, 12, "adamw")
    trained(tmp_path / "state", stop, "adamw")
    found = trained(tmp_path / "state", 12, "adamw")
    assert whole["replaced"] > 0
    assert found.keys() == whole.keys()
    for name, values in whole.items():
        assert torch.equal(found[name], values), name


def test_a_state_of_another_mask_is_refused() -> None:
    model, _, masks = small()
    with sparse_finetune(model, masks) as tickets:
        regrowth = tickets.regrow(torch.optim.SGD(tickets.parameters()), total_steps=9, every=3, window=1)
        state = regrowth.state_dict()
        regrowth.load_state_dict(state)
        with pytest.raises(MaskError, match=r"'0\.weight' has 32 entries, but the state contains none for it"):
            regrowth.load_state_dict({k: v for k, v in state.items() if not k.startswith("0")})
        with pytest.raises(MaskError, match="has 32 entries, but the state contains 31 for it"):
            regrowth.load_state_dict({**state, "0.weight/positions": torch.arange(31)})
        with pytest.raises(MaskError, match="entries of parameters that are not in the mask"):
            regrowth.load_state_dict({**state, "1.weight/positions": torch.arange(31)})
        for wrong in (torch.arange(96 - 31, 97), torch.arange(31, -1, -1), torch.zeros(32, dtype=torch.int32)):
            with pytest.raises(MaskError, match=r"'0\.weight': the state must contain increasing positions below 96"):
                regrowth.load_state_dict({**state, "0.weight/positions": wrong})
        with pytest.raises(MaskError, match="incomplete: it has no 'done'"):
            regrowth.load_state_dict({k: v for k, v in state.items() if k != "done"})
        fixed = tickets.get_extra_state()[:32]
        regrowth.load_state_dict({**state, "0.weight/positions": torch.arange(32)})
        assert tickets.leaves["0.weight"].indices.tolist() == list(range(32))
        with pytest.raises(MaskError, match="another mask"):
            tickets.set_extra_state(fixed)
        saved = {key: value.clone() for key, value in tickets.state_dict().items()}
        regrowth.load_state_dict(state)
        tickets.load_state_dict(saved)
        assert tickets.leaves["0.weight"].indices.tolist() == list(range(32))
    with pytest.raises(MaskError, match="another mask"), sparse_finetune(model, masks) as tickets:
        tickets.load_state_dict(saved)


class Quantised(torch.optim.SGD):
    """An optimizer with a state that is not one number per delta."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["state1"] = torch.zeros(parameter.shape, dtype=torch.uint8)


def test_what_cannot_be_meant_is_refused() -> None:
    model, _, masks = small()
    with sparse_finetune(model, masks) as tickets:
        optimizer = torch.optim.SGD(tickets.parameters(), lr=0.1)
        given = {"total_steps": 9, "every": 3, "window": 1}
        for change, message in (
            ({"every": 0}, "`every` must be greater than zero, found 0"),
            ({"every": 2.5}, "`every` must be a whole number"),
            ({"every": 9}, "`every` must be below `total_steps`, found every 9, total_steps 9"),
            ({"window": 4}, "`window` must be at most `every`, found window 4, every 3"),
            ({"share": 0}, "`share` must be above 0 and at most 1, found 0"),
            ({"share": np.nan}, "`share` must be above 0"),
            ({"scores": lambda _, weight: weight}, "`share` and `window` have no effect together with `scores`"),
            ({"excluded": {"x": [1]}}, None),
        ):
            with pytest.raises(UsageError if message else MaskError, match=message or "has no parameter 'x'"):
                tickets.regrow(optimizer, **{**given, **change})
        with pytest.raises(UsageError, match="does not train all deltas"):
            tickets.regrow(torch.optim.SGD(list(tickets.parameters())[:1]), **given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            with pytest.raises(UsageError, match="or average its masked gradient"):
                tickets.regrow(optimizer, **given)
        tickets.regrow(optimizer, **given, share=1)
        with pytest.raises(UsageError, match="changes already"):
            tickets.regrow(optimizer, **given)
        tickets(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    with pytest.raises(UsageError, match="block has ended"):
        tickets.regrow(optimizer, **given)


def test_a_state_of_the_optimizer_that_cannot_follow_is_refused() -> None:
    model, steps, masks = small()
    message = r"the state 'state1' of Quantised is torch\.uint8 \[32\], not one number per delta"
    inputs, targets = steps[0][0]
    with sparse_finetune(model, masks) as tickets:
        optimizer = Quantised(tickets.parameters(), lr=0.1)
        tickets.regrow(optimizer, total_steps=9, every=2, window=1, share=1)
        for step in range(2):
            (tickets(inputs) - targets).square().sum().backward()
            if step:
                with pytest.raises(UsageError, match=message):
                    optimizer.step()
                tickets.scatter()
            else:
                optimizer.step()
            optimizer.zero_grad()


@pytest.mark.slow
def test_new_positions_have_to_have_the_values_of_the_base(llama: Path) -> None:
    model, _ = load_model(llama)
    name, parameter = next(iter(eligible_parameters(model).items()))
    with torch.no_grad():
        parameter.view(-1)[1::2] += 1
    message = rf"tensor '{name}': \d+ of 100 masked weights of the model are not those of"
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    masks = {name: np.arange(0, 200, 2)}  # these have the values of the base

    def train() -> None:
        with sparse_finetune(model, masks, ModelFolder(llama)) as tickets:
            optimizer = torch.optim.SGD(tickets.parameters(), lr=0.1)
            tickets.regrow(optimizer, total_steps=3, every=1, share=1)
            tickets(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    with pytest.raises(BaseMismatchError, match=message):
        train()


def test_a_tied_weight_is_excluded_under_any_name() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    model[2].weight = model[0].weight
    excluded = {"0.weight": np.arange(0, 18), "2.weight": np.arange(12, 24)}
    with sparse_finetune(model, {"2.weight": np.arange(28, 36)}) as tickets:
        optimizer = torch.optim.SGD(tickets.parameters(), lr=0.1)
        regrowth = tickets.regrow(optimizer, total_steps=9, every=2, window=1, share=1, excluded=excluded)
        for _ in range(9):
            tickets(torch.randn(4, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert regrowth.replaced > 0
        assert tickets.leaves["0.weight"].indices.min() >= 24


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("architecture", "stored"), [("llama", "float32"), ("mixtral", "bfloat16")])
def test_the_file_gives_what_was_trained(architecture: str, stored: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Fused experts and rounded weights: the vector has the last mask, and other weights the base's bits."""
    folder = make_architecture(architecture, tmp_path / "base", dtype=stored)
    base = ModelFolder(folder)
    model, _ = load_model(folder, dtype)
    masks = {name: np.arange(0, p.numel(), 9) for name, p in eligible_parameters(model).items()}
    torch.manual_seed(0)
    batch = torch.randint(0, model.config.vocab_size, (4, 12))
    with sparse_finetune(model, masks, base) as tickets:
        optimizer = torch.optim.AdamW(tickets.parameters(), lr=1e-2)
        regrowth = tickets.regrow(optimizer, total_steps=6, every=2, window=1, share=0.5)
        for _ in range(6):
            tickets(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        vector = tickets.vector()
        found = {name: leaf.indices.numpy() for name, leaf in tickets.leaves.items()}
    assert regrowth.replaced > 0
    assert any(not np.array_equal(found[name], masks[name]) for name in masks)
    assert sum(len(vector[name]) for name in vector) == sum(map(len, masks.values()))
    apply(vector, base, tmp_path / "out")
    expected, _ = load_model(tmp_path / "out", dtype)
    parameters = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), parameters[name].detach()), name
