"""A leaf: the deltas of one masked weight matrix, as a parameter that any torch optimizer can train.

If processes share the matrix, as by `fully_shard`, each has the deltas of its own rows, and the trainable parameter is
a DTensor of these. DTensors have parts of equal length, so the parts are filled up with zeros.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from taskvec_formats import SparseTensor
from taskvec_formats.sparse import Indices

from ..errors import UsageError
from .sharding import like_parts, own_part, own_range


class Watch(Protocol):
    """Looks at the dense gradient of a backward pass, which is freed afterwards."""

    def __call__(self, leaf: Leaf, dense: torch.Tensor, *, begins: bool) -> None:
        """Look at a dense gradient. `begins`: whether it is the first since gradients were cleared."""


class Leaf:
    """Deltas of one masked weight matrix.

    Attributes:
        name: Name of the parameter.
        weight: The model's parameter, of any shape.
        shape: Shape of the parameter.
        first: Flat position of the first element that this process has; 0 if it has all.
        indices: Masked positions among the elements that this process has, int32 or int64 [n], increasing.
        base: The base's values at these positions, [n], in the dtype in which they are stored.
        delta: The trainable nn.Parameter, f32 [n], initially zero. If processes share the weight, a DTensor whose parts
            have the length of the longest.
        arrived: Whether a gradient has reached it.
        watch: Called with the leaf and each dense gradient, after `delta` has got its part of it; None if nobody needs
            to see dense gradients.

    Args:
        name: Name of the parameter.
        weight: The model's parameter, of any shape.
        indices: Flat masked positions, int64 [n], increasing, among those that this process has.
        base: The base's values at these positions. If None, the weight's own.
        length: The largest number of masked positions that a process has of the weight. If None, n.
    """

    def __init__(
        self,
        name: str,
        weight: nn.Parameter,
        indices: Indices,
        base: torch.Tensor | None = None,
        length: int | None = None,
    ) -> None:
        self.name = name
        self.weight = weight
        self.shape = weight.shape
        self.first, _ = own_range(name, weight)
        # positions take half the memory in int32, and few matrices need more
        narrow = np.int32 if weight.numel() < 2**31 else np.int64
        self.indices = torch.from_numpy((indices - self.first).astype(narrow)).to(weight.device)
        self.base = self._flat(weight).index_select(0, self.indices) if base is None else base.to(weight.device)
        length = len(indices) if length is None else length
        zeros = torch.zeros(length, dtype=torch.float32, device=weight.device)
        self.delta = nn.Parameter(like_parts(weight, zeros))
        self.arrived = False
        self.watch: Watch | None = None
        self._written = self._version()  # version of the delta that was last written into the weight
        self._spent: int | None = None  # version of the gradient that an optimizer has used

    @staticmethod
    def _flat(tensor: torch.Tensor) -> torch.Tensor:
        return own_part(tensor).view(-1)

    @property
    def values(self) -> torch.Tensor:
        """The deltas of this process, f32 [n]: a view, whose changes affect `delta`."""
        return own_part(self.delta)[: len(self.indices)]

    def _version(self) -> int:
        """Number of changes of the delta, also of those of the part of this process alone."""
        changes = self.delta._version
        return changes + own_part(self.delta)._version if isinstance(self.delta, DTensor) else changes

    def gather(self, weight: torch.Tensor) -> None:
        """Add the masked part of the dense gradient to the leaf's gradient, and free the dense gradient.

        Under torch.distributed, the gradient is averaged over all processes. `fully_shard` has done that already.

        Args:
            weight: The model's parameter, with its gradient.

        Raises:
            UsageError: The weight is not up to date, or the gradient of the last step was not cleared.
        """
        assert weight.grad is not None
        if not self.delta.requires_grad:  # frozen by the caller
            weight.grad = None
            return
        if self.changed() and self.missed():
            raise UsageError(
                f"the deltas of parameter {self.name!r} were changed, but not written into the model before the next "
                "backward pass: call tickets.scatter() after each update; optimizers that update several times in one "
                "step, such as LBFGS, are not supported"
            )
        self._written = self._version()
        if self.delta.grad is not None and self.delta.grad._version == self._spent:
            raise UsageError(
                f"the gradient of parameter {self.name!r} was not cleared after the optimizer's step: "
                "call optimizer.zero_grad() or tickets.zero_grad(), not model.zero_grad()"
            )
        self._spent = None
        self.arrived = True
        grad = own_part(weight.grad).reshape(-1).index_select(0, self.indices).float()
        if isinstance(weight, DTensor):
            missing = own_part(self.delta).numel() - grad.numel()
            grad = like_parts(weight, nn.functional.pad(grad, (0, missing)))
        elif distributed.is_initialized():
            # DistributedDataParallel relies on autograd, which does not see the leaves
            distributed.all_reduce(grad.div_(distributed.get_world_size()))
        begins = self.delta.grad is None
        self.delta.grad = grad if self.delta.grad is None else self.delta.grad.add_(grad)
        if self.watch is not None:
            self.watch(self, own_part(weight.grad), begins=begins)
        weight.grad = None

    def spend(self) -> None:
        """Record that an optimizer has used the gradient, which must be cleared before the next one."""
        if self.delta.grad is not None:
            self._spent = self.delta.grad._version

    def scatter(self) -> None:
        """Write round(base + delta) into the weight."""
        self._flat(self.weight).index_copy_(0, self.indices.long(), self._tuned())
        self._written = self._version()

    @torch.no_grad()
    def move(self, indices: torch.Tensor, base: torch.Tensor | None) -> None:
        """Exchange the mask. The weight becomes that of the base, and the deltas have to be set and written anew.

        Args:
            indices: The new positions, as many as before, increasing.
            base: The base's values there. If None, those that the weight has without deltas.
        """
        flat = self._flat(self.weight)
        flat.index_copy_(0, self.indices.long(), self.base.to(self.weight.dtype))
        self.indices = indices.to(self.indices)
        self.base = flat.index_select(0, self.indices) if base is None else base.to(self.weight.device)

    def changed(self) -> bool:
        """Whether an operation has changed the delta since the weight was written. Changes through .data are not
        detected.
        """
        return self._version() != self._written

    def differing(self, among: slice) -> int:
        """Number of these entries at which the weight differs from the base, rounded to the weight's dtype."""
        held = self._flat(self.weight).index_select(0, self.indices[among])
        return _differing(held, self.base[among].to(self.weight.dtype))

    def missed(self) -> int:
        """Number of masked positions at which the weight differs from round(base + delta)."""
        return _differing(self._flat(self.weight).index_select(0, self.indices), self._tuned())

    def _tuned(self) -> torch.Tensor:
        return (_wide(self.base) + self.values).to(self.base.dtype).to(self.weight.dtype)

    def follow(self) -> None:
        """Move to the device of the weight."""
        self.indices = self.indices.to(self.weight.device)
        self.base = self.base.to(self.weight.device)

    def entries(self) -> SparseTensor:
        """The deltas as they should be stored, f32, at the positions of the whole parameter.

        Bits of a delta below the f32 resolution of base + delta have no effect, but make the file larger. Each delta is
        therefore replaced by (base + delta) − base, unless that changes the sum.
        """
        base, delta = _wide(self.base).cpu().numpy(), self.values.cpu().numpy()
        total = base + delta.astype(base.dtype)
        short = (total - base).astype(np.float32)
        values = np.where(base + short.astype(base.dtype) == total, short, delta)
        indices = self.first + self.indices.cpu().numpy().astype(np.int64)
        return SparseTensor.owning(tuple(self.weight.shape), indices, values)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to f32, or keep f64: torch does not promote the 8-bit dtypes."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _differing(found: torch.Tensor, expected: torch.Tensor) -> int:
    """Number of positions at which two tensors of one dtype differ in value; −0.0 equals 0.0, all NaNs are equal."""
    found, expected = _wide(found), _wide(expected)
    return int(torch.count_nonzero((found != expected) & ~(found.isnan() & expected.isnan())))
