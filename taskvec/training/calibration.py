"""Calibration: fine-tune all eligible weights for a while, to see which of them matter.

Algorithm 1 of arXiv 2406.16797 ranks weights by |w_T − w|, how far T steps moved them. Two other rankings come from the
same pass: |Σ g|, the gradients summed up (SHiRA, arXiv 2406.13175), and Σ g², their empirical Fisher information (FISH,
arXiv 2111.09839). The base is never kept in memory: it is read from disk again, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import TrainingError
from ..masks import FloatArray
from .optimizers import make_optimizer
from .run import Run


class FactoredRMSprop(Optimizer):
    """RMSprop that needs little memory: weights and one gradient.

    Each parameter is stepped inside the backward pass, as soon as its gradient is there, and the gradient is freed. The
    second moment is kept by row and by column (Adafactor, arXiv 1804.04235, section 3): v ≈ rows·columns / mean(rows).
    What a step loses in rounding to bf16 weights is carried to the next (Kahan summation), in `lost`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, alpha: float = 0.99, eps: float = 1e-8) -> None:
        super().__init__(parameters, {"lr": lr, "alpha": alpha, "eps": eps})
        (group,) = self.param_groups
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._update) for parameter in group["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing is left to do."""

    def close(self) -> None:
        """Let go of the parameters."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _update(self, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        (group,) = self.param_groups
        grad = weight.grad.float().reshape(-1, weight.shape[-1])
        weight.grad = None
        state = self.state[weight]
        if not state:
            state["rows"], state["columns"] = grad.new_zeros(len(grad)), grad.new_zeros(grad.shape[1])
            if weight.dtype != torch.float32:
                state["lost"] = torch.zeros_like(weight)
        for name, axis in (("rows", 1), ("columns", 0)):
            mean_square = torch.linalg.vector_norm(grad, dim=axis).square_().div_(grad.shape[axis])
            state[name].lerp_(mean_square, 1 - group["alpha"])
        tiny = torch.finfo(torch.float32).tiny
        grad.div_((state["rows"] / state["rows"].mean().clamp(tiny)).sqrt_().clamp_(tiny).unsqueeze(1))
        grad.div_(state["columns"].sqrt().add_(group["eps"])).mul_(-group["lr"])
        change = grad.view(weight.shape)
        if weight.dtype == torch.float32:
            weight.add_(change)
            return
        wanted = change.add_(weight).add_(state["lost"])
        weight.copy_(wanted)
        state["lost"].copy_(wanted.sub_(weight))


def calibrate(run: Run) -> tuple[Callable[[str], FloatArray], list[float]]:
    """Fine-tune all eligible weights; return their scores, tensor name -> f32 [size], and the losses.

    The weights are left as they are, for `run.reset`. Scores raise TrainingError, naming the tensor, where they are not
    numbers.
    """
    options = run.options
    parameters = run.parameters()
    for parameter in run.model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    lr = options.calibration_lr or options.lr
    steps = options.calibration_steps
    if options.calibration_epochs is not None:
        steps = run.steps_of(options.calibration_epochs)
    with _observed(parameters, options.mask) as sums:
        optimizer: Optimizer
        if options.low_memory:
            optimizer = FactoredRMSprop(parameters.values(), lr)
        else:
            optimizer = make_optimizer(options.optimizer, parameters.values(), lr)
            names = {id(parameter): name for name, parameter in parameters.items()}
            run.pull(optimizer, lambda parameter: run.moved(names[id(parameter)]))
        dense = not options.low_memory
        curve = run.phase("calibrating", run.model, optimizer, steps=steps, seed=options.seed, dense=dense)
    if isinstance(optimizer, FactoredRMSprop):
        optimizer.close()
    run.model.zero_grad(set_to_none=True)

    def scores(name: str) -> FloatArray:
        place, form = run.placed[name], run.forms[name]
        if sums:
            values = sums[place.parameter].view(-1)[place.start : place.start + form.size]
        else:
            weight = run.weight(name)
            values = weight.float() - run.started(name).to(weight).float()
            if options.low_memory and (lost := optimizer.state[parameters[place.parameter]].get("lost")) is not None:
                values += lost.view(-1)[place.start : place.start + form.size]
        # the loss shows a step that diverged only at the next step, and the last one has none
        if not bool(values.isfinite().all()):
            raise TrainingError(f"tensor {name!r}: calibration ended in weights that are not numbers; try a lower --lr")
        result: FloatArray = values.cpu().numpy()
        return result

    return scores, curve.losses


@contextmanager
def _observed(parameters: dict[str, nn.Parameter], criterion: str) -> Iterator[dict[str, torch.Tensor]]:
    """Within the block gradients, or their squares, are summed up as they arrive; nothing for "magnitude"."""
    if criterion == "magnitude":
        yield {}
        return
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}

    def observe(weight: torch.Tensor, name: str) -> None:
        assert weight.grad is not None
        total = sums[name] = sums[name].to(weight.device)
        if criterion == "gradient":
            total.add_(weight.grad)
        else:
            grad = weight.grad.float()
            total.addcmul_(grad, grad)

    handles = [
        parameter.register_post_accumulate_grad_hook(lambda weight, name=name: observe(weight, name))
        for name, parameter in parameters.items()
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
