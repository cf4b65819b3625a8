"""Drop and regrow: a mask that changes during training.

This is SpIEL-AG (arXiv 2401.16405, section 3; code: github.com/AlanAnsell/peft, selection algorithm "rigl"). In every
masked parameter by itself, every S steps:

- *Drop* the entries with the smallest |delta|, as many as a share of the parameter's entries that falls linearly from
  its initial value to zero at the end of training. The weights of dropped entries return to the base.
- *Grow* as many among the candidates, those with the largest |Σ g|. The candidates are the positions with the largest
  |g| in one backward pass, as many as the parameter has entries, masked ones included. Their gradients g are then
  summed over a window of steps. An entry that is both dropped and grown stays as it is.
- A grown entry has delta 0, and its moments in the optimizer start at the mean of g and of g².

What differs from the source:

- The source's mask is random and is replaced as a whole after the first window. Here it is the mask that was chosen,
  and changes after every S steps.
- The window is the steps up to a change. In the source, the steps S to S + 5 are summed for the change after step
  S + 5.
- g is the gradient of a step as the optimizer gets it, after clipping. The source takes that of a backward pass, before
  clipping.
- The source's AdamW counts the steps of each entry. torch's optimizers count those of a parameter, so the means are
  multiplied by 1 − β^t, which their bias correction divides by. The other state of a grown entry is zero.
- Positions without a gradient and excluded positions are never grown, and equal values are taken in the order of their
  positions.

The number of entries of each parameter stays the same. If there are too few candidates, fewer entries are replaced.

Instead, a mask may be chosen again every S steps by scores of the current weights, as in LIFT (arXiv 2506.00772; code:
github.com/zihanghliu/LIFT, `update_masks`): those with the largest scores, as many as before. As in the source, entries
that stay keep their moments, and the moments of new entries are zero. In the source, weights that leave the mask keep
their trained values, so that more and more weights differ from the base. Here they return to the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from ..errors import MaskError, UsageError
from .leaf import Leaf
from .origin import Origin
from .sharding import own_part

# defaults of the source: the share of the entries that is replaced, and the steps over which gradients are summed
SHARE, WINDOW = 0.2, 5
# takes the name of a parameter and its current weights, and returns a score of each weight
Scores = Callable[[str, torch.Tensor], torch.Tensor]
_BLOCK = 1 << 22  # elements whose magnitudes are in memory at once


@dataclass
class Candidates:
    """Positions that may be grown in a parameter, and their gradients in the steps of the window.

    Attributes:
        positions: Flat positions, int32 or int64 [m], increasing.
        current: Gradients of the step that is computed, f32 [m].
        sums: Σ g over the steps before, f32 [m].
        squares: Σ g² over these steps, f32 [m].
        steps: Number of these steps.
        norm: Norm of the parameter's masked gradient before it is clipped, a scalar.
    """

    positions: torch.Tensor
    current: torch.Tensor
    sums: torch.Tensor
    squares: torch.Tensor
    steps: int
    norm: torch.Tensor


class Regrowth:
    """Changes masks during training, by hooks on gradients and on the steps of an optimizer.

    `SparseModel.regrow` creates it.

    Args:
        leaves: Parameter name -> Leaf. Each process has the whole parameter.
        origin: The base, or None if it is not known.
        optimizer: The optimizer of the deltas.
        total_steps: Steps of training, over which the share falls to zero.
        every: Steps between changes.
        share: The share of the entries that the first change would drop if it happened at the start.
        window: Steps before each change over which gradients are summed.
        excluded: Parameter name -> flat positions that are never grown, int64, increasing.
        scores: Choose each mask by these scores instead. `share` and `window` then have no effect.

    Attributes:
        done: Number of steps that were taken.
        replaced: Number of entries that were replaced so far.
    """

    def __init__(
        self,
        leaves: Mapping[str, Leaf],
        origin: Origin | None,
        optimizer: Optimizer,
        *,
        total_steps: int,
        every: int,
        share: float,
        window: int,
        excluded: Mapping[str, torch.Tensor],
        scores: Scores | None = None,
    ) -> None:
        self.done = 0
        self.replaced = 0
        self._leaves = leaves
        self._origin = origin
        self._optimizer = optimizer
        self._total = total_steps
        self._every = every
        self._share = Fraction(str(share))  # exact in decimal: 0.3 · 10 entries are 3
        self._window = window
        self._excluded = excluded
        self._scores = scores
        self._candidates: dict[str, Candidates] = {}
        self._inside = 0  # torch calls the hooks again for a step of a class that the step of its subclass calls
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._watch()

    def end(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        for leaf in self._leaves.values():
            leaf.watch = None
        self._candidates.clear()

    def _watch(self) -> None:
        """Look at the dense gradients of the next step if it is in the window of a change."""
        next_change = (self.done // self._every + 1) * self._every
        watching = self._scores is None and self._total > next_change <= self.done + self._window
        for leaf in self._leaves.values():
            leaf.watch = self._seen if watching else None

    @torch.no_grad()
    def _seen(self, leaf: Leaf, dense: torch.Tensor, *, begins: bool) -> None:
        """Add the gradient of a backward pass.

        Args:
            leaf: The leaf, whose gradient contains that of this backward pass.
            dense: The dense gradient of this backward pass.
            begins: Whether this is the first backward pass of a step.
        """
        dense = dense.reshape(-1)
        found = self._candidates.get(leaf.name)
        if found is None:
            positions = largest(dense, len(leaf.indices), self._excluded_of(leaf))
            found = _candidates(positions.to(leaf.indices))
            self._candidates[leaf.name] = found
        if begins:
            found.current.zero_()  # the optimizer may have skipped a step
        found.current += dense.index_select(0, found.positions).float()
        assert leaf.delta.grad is not None
        found.norm = torch.linalg.vector_norm(own_part(leaf.delta.grad))

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        """Add the gradients of the step, scaled as those of the entries were since the backward pass."""
        self._inside += 1
        if self._inside > 1:
            return
        for name, found in self._candidates.items():
            grad = self._leaves[name].delta.grad
            if grad is not None:
                scale = torch.linalg.vector_norm(own_part(grad)) / found.norm
                found.current *= torch.where(found.norm > 0, scale, 1)
                found.sums += found.current
                found.squares.addcmul_(found.current, found.current)
                found.current.zero_()
                found.steps += 1

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        self._inside -= 1
        if self._inside:
            return
        self.done += 1
        if self.done % self._every == 0 and self.done < self._total:
            for leaf in self._leaves.values():
                self._change(leaf)
            self._candidates.clear()
        self._watch()

    def _change(self, leaf: Leaf) -> None:
        """Replace entries of a leaf. The moments of those without a known gradient become zero."""
        if not leaf.delta.requires_grad:  # frozen by the caller
            return
        before, values = leaf.indices, leaf.values.clone()
        found = self._candidates.get(leaf.name)
        if self._scores is not None:
            leaf.scatter()  # the step has changed the deltas only
            scores = self._scores(leaf.name, own_part(leaf.weight))
            after = chosen(before, scores, self._excluded_of(leaf))
        elif found is not None:
            count = int(self._share * len(before) * (self._total - self.done) / self._total)
            after = regrown(before, values, found.positions, found.sums, count)
        else:
            return
        source, kept = _places(after, before)
        if kept.all():
            return
        states = self._state(leaf)
        self.replaced += len(kept) - int(kept.sum())
        self._move(leaf, after, torch.where(kept, values[source], 0))
        seeds: dict[str, torch.Tensor] = {}
        if found is not None:  # what is grown is one of the candidates
            place, _ = _places(after, found.positions)
            seeds = self._seeds(leaf, found.sums[place] / found.steps, found.squares[place] / found.steps)
        for key, state in states.items():
            state.copy_(torch.where(kept, state[source], seeds.get(key, torch.zeros_like(state))))

    def _excluded_of(self, leaf: Leaf) -> torch.Tensor | None:
        excluded = self._excluded.get(leaf.name)
        return None if excluded is None else excluded.to(leaf.indices.device)

    def _move(self, leaf: Leaf, indices: torch.Tensor, values: torch.Tensor) -> None:
        """Give a leaf another mask and these deltas. Raises BaseMismatchError if its weight is not that of the base."""
        if self._origin is None:
            leaf.move(indices, None)
        else:
            leaf.move(indices, self._origin.values(leaf.name, indices.cpu().numpy().astype(np.int64)))
            self._origin.compare(leaf)
        leaf.values.copy_(values)
        leaf.scatter()

    def _state(self, leaf: Leaf) -> dict[str, torch.Tensor]:
        """What the optimizer has for each entry of a leaf, f32 [n] by name: views.

        Raises:
            UsageError: It has something else.
        """
        found = {}
        for key, state in self._optimizer.state.get(leaf.delta, {}).items():
            if isinstance(state, torch.Tensor) and state.dim():
                if state.shape != leaf.delta.shape or not state.is_floating_point():
                    raise UsageError(
                        f"the state {key!r} of {type(self._optimizer).__name__} is {state.dtype} "
                        f"{list(state.shape)}, not one number per delta, so the entries of parameter {leaf.name!r} "
                        "cannot be replaced: use an optimizer of torch.optim"
                    )
                found[key] = own_part(state)[: len(leaf.indices)]
        return found

    def _seeds(self, leaf: Leaf, mean: torch.Tensor, square: torch.Tensor) -> dict[str, torch.Tensor]:
        """The moments of entries whose gradients have this mean and mean square, by the names of torch.optim."""
        group = next(
            group for group in self._optimizer.param_groups if any(each is leaf.delta for each in group["params"])
        )
        betas = group.get("betas", (0.0, 0.0))
        steps = float(self._optimizer.state.get(leaf.delta, {}).get("step", 0))
        return {
            "exp_avg": mean * (1 - float(betas[0]) ** steps),
            "exp_avg_sq": square * (1 - float(betas[1]) ** steps),
            "square_avg": square,
            "grad_avg": mean,
        }

    # checkpoints

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The positions of all entries, and what is needed to continue.

        Returns:
            Name -> tensor, for `load_state_dict`. safetensors can save them.
        """
        state = {"done": torch.tensor(self.done), "replaced": torch.tensor(self.replaced)}
        for name, leaf in self._leaves.items():
            state[f"{name}/positions"] = leaf.indices.clone()
        for name, found in self._candidates.items():
            state[f"{name}/candidates"] = found.positions.clone()
            state[f"{name}/sums"] = found.sums.clone()
            state[f"{name}/squares"] = found.squares.clone()
            state[f"{name}/steps"] = torch.tensor(found.steps)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from a `state_dict`. All deltas become zero: load them, and the optimizer's state, afterwards.

        Args:
            state: What `state_dict` returned.

        Raises:
            MaskError: The state is that of other tensors or of another number of entries.
            BaseMismatchError: The model does not have the base's values at the positions.
        """
        missing = {"done", "replaced"} - state.keys()
        if missing:
            raise MaskError(f"the state of a mask that changes is incomplete: it has no {min(missing)!r}")
        for name, leaf in self._leaves.items():
            _check_positions(name, leaf, state.get(f"{name}/positions"))
        if any(key.endswith("/positions") and key.rpartition("/")[0] not in self._leaves for key in state):
            raise MaskError("the state contains entries of parameters that are not in the mask")
        self.done, self.replaced = int(state["done"]), int(state["replaced"])
        self._candidates.clear()
        for name, leaf in self._leaves.items():
            positions = state[f"{name}/positions"].to(leaf.indices)
            self._move(leaf, positions, torch.zeros_like(leaf.values))
            if f"{name}/candidates" in state:
                held = self._candidates[name] = _candidates(state[f"{name}/candidates"].to(leaf.indices, copy=True))
                held.sums += state[f"{name}/sums"].to(held.sums)
                held.squares += state[f"{name}/squares"].to(held.squares)
                held.steps = int(state[f"{name}/steps"])
        self._watch()


def _check_positions(name: str, leaf: Leaf, positions: torch.Tensor | None) -> None:
    """Raise MaskError unless these may become the positions of a leaf."""
    if positions is None or positions.shape != leaf.indices.shape:
        found = "none" if positions is None else f"{len(positions):,}"
        raise MaskError(f"parameter {name!r} has {len(leaf.indices):,} entries, but the state contains {found} for it")
    if positions.min() < 0 or positions.max() >= leaf.weight.numel() or (positions.diff() <= 0).any():
        raise MaskError(f"parameter {name!r}: the state must contain increasing positions below {leaf.weight.numel()}")


def _candidates(positions: torch.Tensor) -> Candidates:
    current, sums, squares = (torch.zeros(len(positions), device=positions.device) for _ in range(3))
    return Candidates(positions, current, sums, squares, 0, torch.zeros((), device=positions.device))


def regrown(
    indices: torch.Tensor, values: torch.Tensor, candidates: torch.Tensor, sums: torch.Tensor, count: int
) -> torch.Tensor:
    """The mask of a parameter after a change.

    Args:
        indices: Its positions, int [n], increasing.
        values: Its deltas, f32 [n].
        candidates: Positions that may be grown, in the dtype of `indices`, [m], increasing.
        sums: The sums of their gradients, f32 [m]. Those with a sum of zero are not grown.
        count: The largest number of entries to replace.

    Returns:
        n positions, increasing, in the dtype of `indices`.
    """
    leaving = torch.sort(values.abs(), stable=True).indices[:count]
    stays = torch.ones_like(indices, dtype=torch.bool)
    stays[leaving] = False
    free = (sums != 0) & ~torch.isin(candidates, indices[stays])
    candidates, sums = candidates[free], sums[free]
    growing = candidates[torch.sort(sums.abs(), stable=True, descending=True).indices[:count]]
    leaving = leaving[~torch.isin(indices[leaving], growing)]
    growing = growing[~torch.isin(growing, indices)]
    stays[:] = True
    stays[leaving[: len(growing)]] = False
    return torch.cat([indices[stays], growing]).sort().values


def chosen(indices: torch.Tensor, scores: torch.Tensor, excluded: torch.Tensor | None = None) -> torch.Tensor:
    """The positions with the largest scores, as many as a mask has.

    Args:
        indices: The mask, int [n], increasing. If fewer than n scores are not zero, its first positions are added.
        scores: A score of each weight, in any shape.
        excluded: Positions that may not be selected, int64, increasing.

    Returns:
        n positions, increasing, in the dtype of `indices`.
    """
    best = largest(scores.reshape(-1).to(indices.device), len(indices), excluded).to(indices.dtype)
    others = indices[~torch.isin(indices, best)]
    return torch.cat([best, others[: len(indices) - len(best)]]).sort().values


def largest(values: torch.Tensor, k: int, excluded: torch.Tensor | None = None) -> torch.Tensor:
    """The positions of the k largest magnitudes. The first ones of equal magnitudes are taken, and zeros never are.

    Memory: O(k), and a block of the values. NaN is as large as infinity.

    Args:
        values: Flat floating-point values, [n].
        k: How many to select; all that are not zero if these are fewer.
        excluded: Positions that are not selected, int64, increasing.

    Returns:
        Positions, int64, increasing.
    """

    def magnitudes() -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, len(values), _BLOCK):
            block = values[start : start + _BLOCK].float().abs()
            block.nan_to_num_(torch.inf, torch.inf)
            if excluded is not None:
                low, high = torch.searchsorted(excluded, torch.tensor([start, start + len(block)]).to(excluded))
                block[excluded[low:high] - start] = 0
            yield start, block

    top = torch.empty(0, device=values.device)
    for _, block in magnitudes():
        top = torch.cat([top, block])
        top = torch.topk(top, min(k, len(top)), sorted=False).values
    top = top[top > 0]
    if not len(top):
        return torch.empty(0, dtype=torch.int64, device=values.device)
    threshold = top.min()
    ties = int((top == threshold).sum())
    found = []
    for start, block in magnitudes():
        tied = (block == threshold).nonzero().view(-1)[:ties]
        ties -= len(tied)
        found.append(torch.cat([(block > threshold).nonzero().view(-1), tied]).sort().values + start)
    return torch.cat(found)


def _places(wanted: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find positions in an increasing list: the index of each, and whether it is there. Others have any valid index."""
    places = torch.searchsorted(positions, wanted).clamp_(max=max(0, len(positions) - 1))
    return places, positions[places] == wanted
