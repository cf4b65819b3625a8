"""Calibration: brief fine-tuning of all eligible weights, in which what a criterion of the mask needs is observed.

Algorithm 1 of arXiv 2406.16797 needs the changes of T steps, w_T − w. Other criteria (`training.criteria`) need Σ g or
Σ g², sums of the gradients of the same steps. The base is not kept in memory: it is read from disk again, tensor by
tensor.
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
from .criteria import GRADIENTS, Criterion
from .lean import LeanRMSprop
from .loop import Curve
from .optimizers import make_optimizer
from .options import AUTO
from .range_test import find_rate
from .rates import default_rate
from .run import Run


def calibrate(run: Run) -> tuple[Callable[[str], FloatArray], Curve]:
    """Fine-tune all eligible weights, and observe what the criterion of the run needs.

    The model keeps the calibrated weights; call `run.reset` to restore the start.

    Args:
        run: The run.

    Returns:
        A function that returns what was observed of a tensor by name, `Criterion.observes`, f32 [size], of the elements
        that this process has, and the losses of the phase. The array may not be changed. The function raises
        DivergedError, naming the tensor, if a value is not finite.
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
        lr = find_rate(run, run.model, optimizer_of, default_rate("fft", options.optimizer), dense=dense)
        run.reset()
    assert lr is not None
    optimizer = optimizer_of(float(lr))

    def counts() -> bool:
        """Whether the gradients of this backward pass count; low memory computes those of each batch twice."""
        return not (isinstance(optimizer, LeanRMSprop) and optimizer.measures)

    with _summed(parameters, options.criterion, counts) as sums:
        curve = run.phase(run.model, optimizer, steps=run.calibration_steps, dense=dense, calibrates=True)
    run.model.zero_grad(set_to_none=True)

    def observed(name: str) -> FloatArray:
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

    return observed, curve


@contextmanager
def _summed(
    parameters: dict[str, nn.Parameter], criterion: Criterion, counts: Callable[[], bool]
) -> Iterator[dict[str, torch.Tensor]]:
    """Within the block, sum up the gradients of the steps, or their squares, if the criterion needs such sums."""
    if not criterion.sums:
        yield {}
        return
    sums = {name: torch.zeros_like(own_part(values), dtype=torch.float32) for name, values in parameters.items()}

    accumulation = GradientState()

    def observe(weight: torch.Tensor, name: str) -> None:
        assert weight.grad is not None
        if not accumulation.sync_gradients or not counts():
            return  # later backward passes of the step add to this gradient, or compute it again
        total = sums[name] = sums[name].to(weight.device)
        grad = own_part(weight.grad)
        if criterion.observes == GRADIENTS:
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
