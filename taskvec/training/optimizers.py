"""Optimizers that options can name, and a memory-saving RMSprop for calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

# Run.pull implements weight decay: that of the optimizers would pull calibrated weights to zero, not to the base
_MAKERS: dict[str, Callable[..., Optimizer]] = {
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": partial(torch.optim.AdamW, weight_decay=0),
    "sgd": torch.optim.SGD,
}


def make_optimizer(name: str, parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
    """Create one of options.OPTIMIZERS with torch's defaults and no weight decay. RMSprop's default α is the paper's,
    0.99.
    """
    return _MAKERS[name](parameters, lr=lr)


class LeanRMSprop(Optimizer):
    """RMSprop with clipped gradients in half the memory: at most one gradient exists at a time, second moments are
    bf16.

    Each parameter is updated inside the backward pass as soon as its gradient is computed, and the gradient is freed.
    The norm of all gradients, needed for clipping, must be known before: a first backward pass of the same batch inside
    `measuring` computes it. The rounding error of a step to bf16 weights is carried over to the next step (Kahan
    summation), as `lost` in the optimizer's state.

    Args:
        parameters: The parameters to train.
        lr: Learning rate.
        clip: Maximum norm of the gradient.
        alpha: α, decay of the second moments.
        eps: ε, added to the denominator.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, clip: float, alpha: float = 0.99, eps: float = 1e-8
    ) -> None:
        super().__init__(parameters, {"lr": lr, "alpha": alpha, "eps": eps})
        self._clip = clip
        self._squares: list[torch.Tensor] = []  # squared norm of each gradient
        self._scale: torch.Tensor | float = 1.0
        self._measures = False
        (group,) = self.param_groups
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in group["params"]]

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within the block, only measure the norm of the gradients, which is used to clip the next ones."""
        self._squares.clear()
        self._measures = True
        try:
            yield
        finally:
            self._measures = False
        norm = torch.stack(self._squares).sum().sqrt()
        self._scale = (self._clip / (norm + 1e-6)).clamp(max=1)  # as in torch's clip_grad_norm_

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: the backward pass has updated the parameters."""

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _arrived(self, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        grad, weight.grad = weight.grad, None
        if self._measures:
            self._squares.append(torch.linalg.vector_norm(grad, dtype=torch.float32).square())
            return
        (group,) = self.param_groups
        state = self.state[weight]
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
