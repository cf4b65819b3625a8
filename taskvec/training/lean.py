"""RMSprop in half the memory, and the Trainer that runs it. If processes share a model, each updates its own part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..models.sharding import own_part
from .trainer import PhaseTrainer


class LeanRMSprop(Optimizer):
    """RMSprop with clipped gradients in half the memory: at most one gradient exists at a time, second moments are
    bf16.

    Inside `updating`, each parameter is updated during the backward pass as soon as its gradient is computed, and the
    gradient is freed. The norm of all gradients, needed for clipping, must be known before: a first backward pass of
    the same batch inside `measuring` computes it. The rounding error of a step to bf16 weights is carried over to the
    next step (Kahan summation).

    Args:
        parameters: The parameters to train.
        lr: Learning rate.
        clip: Maximum norm of the gradient.
        alpha: α, decay of the second moments.
        eps: ε, added to the denominator.
        total: Adds up a number of all processes that share the model.

    Attributes:
        measures: Whether the norm of the gradients is being measured, inside `measuring`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        clip: float,
        alpha: float = 0.99,
        eps: float = 1e-8,
        total: Callable[[torch.Tensor], torch.Tensor] = lambda own: own,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "alpha": alpha, "eps": eps})
        self._clip = clip
        self._squares: list[torch.Tensor] = []  # squared norm of each gradient
        self._scale: torch.Tensor | float = 1.0
        self.measures = False
        self._total = total

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Within the block, backward passes update the parameters."""
        (group,) = self.param_groups
        hooks = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in group["params"]]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within the block, only measure the norm of the gradients, which is used to clip the next ones."""
        self._squares.clear()
        self.measures = True
        try:
            yield
        finally:
            self.measures = False
        norm = self._total(torch.stack(self._squares).sum()).sqrt()
        self._scale = (self._clip / (norm + 1e-6)).clamp(max=1)  # as in torch's clip_grad_norm_

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: the backward pass has updated the parameters."""

    def lost(self, weight: nn.Parameter) -> torch.Tensor | None:
        """Return the rounding error of the last step to the elements of a parameter that this process has.

        Returns:
            A tensor in their shape and dtype; None if it is f32.
        """
        found: torch.Tensor | None = self.state[weight].get("lost")
        return found

    @torch.no_grad()
    def _arrived(self, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        grad, weight.grad = own_part(weight.grad), None
        if self.measures:
            self._squares.append(torch.linalg.vector_norm(grad, dtype=torch.float32).square())
            return
        (group,) = self.param_groups
        state, weight = self.state[weight], own_part(weight)
        if not state:
            state["square"] = torch.zeros_like(weight, dtype=torch.bfloat16)
            if weight.dtype != torch.float32:
                state["lost"] = torch.zeros_like(weight)
        grad = grad.float().mul_(self._scale)
        square = torch.lerp(state["square"].float(), grad * grad, 1 - group["alpha"])
        state["square"].copy_(square)
        change = grad.div_(square.sqrt_().add_(group["eps"])).mul_(-group["lr"])
        if weight.dtype == torch.float32:
            weight.add_(change)
            return
        wanted = change.add_(weight).add_(state["lost"])
        weight.copy_(wanted)
        state["lost"].copy_(wanted.sub_(weight))


class TwoPassTrainer(PhaseTrainer):
    """PhaseTrainer for LeanRMSprop. It passes every batch twice: for the norm of the gradients, then for the updates.

    Args:
        optimizer: The optimizer, which `optimizers` contains too.
        **options: The arguments of PhaseTrainer.
    """

    def __init__(self, optimizer: LeanRMSprop, **options: Any) -> None:
        super().__init__(**options)
        self._lean = optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does."""
        with self._lean.updating():
            return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss of the second pass, which draws the same random numbers as the first."""
        device = self.args.device
        own = device.type in ("cuda", "xpu")  # the others have no random state of their own, or cannot restore it
        forked = {"devices": [device.index or 0], "device_type": device.type} if own else {"devices": []}
        with self._lean.measuring(), torch.random.fork_rng(**forked):
            super().training_step(model, *args, **kwargs)
        return super().training_step(model, *args, **kwargs)
