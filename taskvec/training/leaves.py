"""Sparse leaves: train the masked weights of a model, and nothing else, at a cost that follows the number of entries.

For each masked weight matrix W there is one leaf, the 1-D f32 parameter of its deltas. Backward passes fill W.grad as
usual; a hook gathers its masked part into the leaf's .grad and frees it at once, so that no more than one dense
gradient is alive. Any torch optimizer runs on the leaves, its state as small as they are; after its step

    W[mask] = round(base[mask] + delta)

with the rounding of the dtype in which the base is stored, so that training sees the weights that a `.lota` file will
give, bit for bit, also where the model computes in a wider dtype. Every other element of W is never written.

LoTA, arXiv 2406.16797, Algorithm 1, line "sparse fine-tuning"; the leaves are this project's way to do it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from taskvec_formats import SparseTensor
from taskvec_formats.sparse import Indices


class Leaf:
    """One masked weight matrix.

    weight: the model's parameter, any shape. indices: flat masked positions, int64 [n].
    stored: the dtype in which the base keeps this tensor.
    delta: the trainable nn.Parameter, f32 [n], zero at first.
    """

    def __init__(self, weight: nn.Parameter, indices: Indices, stored: torch.dtype) -> None:
        self.weight = weight
        self.stored = stored
        # positions take half the memory in int32, and few matrices need more
        narrow = np.int32 if weight.numel() < 2**31 else np.int64
        self.indices = torch.from_numpy(indices.astype(narrow)).to(weight.device)
        compute = torch.float64 if stored == torch.float64 else torch.float32
        self.base = self._flat(weight).index_select(0, self.indices).to(compute)
        self.delta = nn.Parameter(torch.zeros(len(indices), dtype=torch.float32, device=weight.device))

    @staticmethod
    def _flat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().view(-1)

    def gather(self, weight: torch.Tensor) -> None:
        """Move the masked part of the dense gradient into the leaf, adding to what is there, and free the rest."""
        assert weight.grad is not None
        grad = weight.grad.reshape(-1).index_select(0, self.indices).float()
        self.delta.grad = grad if self.delta.grad is None else self.delta.grad.add_(grad)
        weight.grad = None

    def scatter(self) -> None:
        """Write round(base + delta) into the weight."""
        tuned = (self.base + self.delta.detach()).to(self.stored).to(self.weight.dtype)
        self._flat(self.weight)[self.indices] = tuned

    def entries(self) -> SparseTensor:
        """The deltas as they should be stored, f32.

        Below the resolution of f32 around base + delta a delta's bits have no effect, yet they fill the file with
        noise. So each is replaced by (base + delta) − base, unless that would not give the same sum.
        """
        base, delta = self.base.cpu().numpy(), self.delta.detach().cpu().numpy()
        total = base + delta.astype(base.dtype)
        short = (total - base).astype(np.float32)
        values = np.where(base + short.astype(base.dtype) == total, short, delta)
        return SparseTensor(tuple(self.weight.shape), self.indices.cpu().numpy().astype(np.int64), values)


class SparseLeaves:
    """The leaves of a model: parameter name -> Leaf. Made by `sparse_finetune`."""

    def __init__(self, leaves: Mapping[str, Leaf]) -> None:
        self.leaves = dict(leaves)

    def parameters(self) -> list[nn.Parameter]:
        """The deltas, f32 [n] a masked matrix: what an optimizer is given."""
        return [leaf.delta for leaf in self.leaves.values()]

    def scatter(self) -> None:
        """Write all leaves into the model; done by itself after each step of an optimizer that holds them."""
        for leaf in self.leaves.values():
            leaf.scatter()

    def entries(self) -> dict[str, SparseTensor]:
        """parameter name -> the trained entries, as they are stored."""
        return {name: leaf.entries() for name, leaf in self.leaves.items()}


@contextmanager
def sparse_finetune(
    model: nn.Module,
    masks: Mapping[str, Indices],
    stored: Mapping[str, torch.dtype] | None = None,
) -> Iterator[SparseLeaves]:
    """Within the `with` block only the masked weights of `model` train, through leaves.

    masks: parameter name -> flat positions, int64, increasing. The model must hold the base's weights.
    stored: parameter name -> dtype in which the base keeps it; the parameter's own dtype where left out.
    Any optimizer over `leaves.parameters()` trains the model in place: leaves are scattered after each of its steps.
    On leaving, the hooks are gone, every `requires_grad` is as before, and the model keeps its trained weights.
    Raises KeyError for a name that the model does not have.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    required = [(parameter, parameter.requires_grad) for parameter in parameters.values()]
    leaves = SparseLeaves(
        {
            name: Leaf(parameters[name], indices, (stored or {}).get(name, parameters[name].dtype))
            for name, indices in masks.items()
            if len(indices)
        }
    )
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    handles = []
    for leaf in leaves.leaves.values():
        leaf.weight.requires_grad_(True)
        handles.append(leaf.weight.register_post_accumulate_grad_hook(leaf.gather))
    ours = {id(parameter) for parameter in leaves.parameters()}

    def after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
        if any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"]):
            leaves.scatter()

    handles.append(register_optimizer_step_post_hook(after_step))
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)
