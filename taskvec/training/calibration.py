"""Calibration: brief fine-tuning of all eligible weights, which gives each of them a score.

Algorithm 1 of arXiv 2406.16797 ranks weights by |w_T − w|, their change in T steps. Two other rankings come from the
same pass: |Σ g|, the summed gradients (SHiRA, arXiv 2406.13175), and Σ g², the empirical Fisher information (FISH,
arXiv 2111.09839). The base is not kept in memory: it is read from disk again, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.state import GradientState  # type: ignore[import-untyped]
from torch import nn
from torch.optim import Optimizer

from ..errors import DivergedError
from ..models.sharding import own_part
from ..vectors.topk import FloatArray
from .lean import LeanRMSprop
from .loop import Curve
from .optimizers import make_optimizer
from .options import AUTO
from .range_test import find_rate
from .rates import lowest_rate
from .run import Run


def calibrate(run: Run) -> tuple[Callable[[str], FloatArray], Curve]:
    """Fine-tune all eligible weights and score them.

    The model keeps the calibrated weights; call `run.reset` to restore the start.

    Args:
        run: The run.

    Returns:
        A function that returns the scores of a tensor by name, f32 [size], of the elements that this process has, and
        the losses of the phase. The function raises DivergedError, naming the tensor, if a score is not finite.
    """
    options = run.options
    parameters = run.parameters()
    for parameter in run.model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    names = {id(parameter): name for name, parameter in parameters.items()}
    dense = not options.low_memory

    def optimizer_of(lr: float) -> Optimizer:
        if options.low_memory:
            return LeanRMSprop(parameters.values(), lr, options.clip, total=run.processes.add)
        optimizer = make_optimizer(options.optimizer, parameters.values(), lr)
        run.pull(optimizer, lambda parameter: run.moved(names[id(parameter)]))
        return optimizer

    lr = options.calibration_lr
    if lr == AUTO:
        lr = find_rate(run, run.model, optimizer_of, lowest_rate("fft", options.optimizer), dense=dense)
        run.reset()
    assert lr is not None
    with _observed(parameters, options.mask) as sums:
        optimizer = optimizer_of(float(lr))
        curve = run.phase(run.model, optimizer, steps=run.calibration_steps, dense=dense, calibrates=True)
    run.model.zero_grad(set_to_none=True)

    def scores(name: str) -> FloatArray:
        if sums:
            values = run.part(name, sums[run.placed[name].parameter])
        else:
            weight = run.weight(name)
            values = weight.float() - run.started(name).to(weight).float()
            lost = (
                optimizer.lost(parameters[run.placed[name].parameter]) if isinstance(optimizer, LeanRMSprop) else None
            )
            if lost is not None:
                values += run.part(name, lost)
        # a step that diverges shows in the loss of the next step only, so the last step is checked here
        if not bool(values.isfinite().all()):
            raise DivergedError(
                f"tensor {name!r}: calibration ended in weights that are not numbers; try a lower `calibration_lr`"
            )
        result: FloatArray = values.cpu().numpy()
        return result

    if run.processes.count > 1:
        with run.processes.agreeing():  # while the mask is chosen, no process can fail alone
            for name in run.forms:
                scores(name)
    return scores, curve


@contextmanager
def _observed(parameters: dict[str, nn.Parameter], criterion: str) -> Iterator[dict[str, torch.Tensor]]:
    """Within the block, sum up the gradients of the steps, or their squares; nothing for "magnitude"."""
    if criterion == "magnitude":
        yield {}
        return
    sums = {name: torch.zeros_like(own_part(values), dtype=torch.float32) for name, values in parameters.items()}

    accumulation = GradientState()

    def observe(weight: torch.Tensor, name: str) -> None:
        assert weight.grad is not None
        if not accumulation.sync_gradients:
            return  # later backward passes of the step add to this gradient
        total = sums[name] = sums[name].to(weight.device)
        grad = own_part(weight.grad)
        if criterion == "gradient":
            total.add_(grad)
        else:
            total.addcmul_(grad.float(), grad.float())

    handles = [
        parameter.register_post_accumulate_grad_hook(lambda weight, name=name: observe(weight, name))
        for name, parameter in parameters.items()
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
