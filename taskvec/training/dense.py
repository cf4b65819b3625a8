"""Baselines for comparison: full fine-tuning, and LoRA through peft (arXiv 2106.09685).

Both result in task vectors, as exact as those of `pack`, so that the same commands merge, apply and compare them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Conv1D

from taskvec_formats import Change
from taskvec_formats.forms import Bits

from ..models.placement import TORCH_DTYPES, Place, bits_of, part_of
from ..models.sharding import own_part
from ..packages import require
from ..vectors.delta import diff_range
from ..vectors.source import DeltaSource, digest_of_entries
from ..vectors.vector import TaskVector, header_of, specs_of
from .folder import RunFolder
from .loop import Curve
from .optimizers import make_optimizer
from .options import AUTO
from .range_test import find_rate
from .rates import default_of
from .run import Run


def train_fully(run: Run, keep: RunFolder) -> Curve:
    """Fine-tune all parameters that have a tensor in the checkpoint, except those that options exclude.

    Args:
        run: The run.
        keep: Folder for the state of the run.

    Returns:
        Losses, evaluations and speed.
    """
    wanted = {run.placed[name].parameter for name in run.chosen(run.placed)}
    parameters = [parameter for name, parameter in run.model.named_parameters() if name in wanted]
    for parameter in run.model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return _train(run, run.model, parameters, keep, lambda: run.restore(run.chosen(run.placed)), dense=True)


def train_lora(run: Run, keep: RunFolder) -> Curve:
    """Train adapters on the linear layers of the blocks and merge them into the weights, in f32.

    Experts that are fused into one parameter have no adapters.

    Args:
        run: The run.
        keep: Folder for the state of the run.

    Returns:
        Losses, evaluations and speed.

    Raises:
        UsageError: peft is missing.
    """
    require("LoRA", "lora")
    from peft import LoraConfig, get_peft_model

    modules = {name.removesuffix(".weight") for name in run.parameters() if name.endswith(".weight")}
    transposed = any(isinstance(run.model.get_submodule(name), Conv1D) for name in modules)
    config = LoraConfig(
        r=run.options.rank,
        lora_alpha=run.options.alpha,
        target_modules=sorted(modules),
        fan_in_fan_out=transposed,
    )
    torch.manual_seed(run.options.seed)  # for the initial values of the adapters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses names that transformers is about to drop
        adapted = get_peft_model(run.model, config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    first = [parameter.detach().clone() for parameter in trained]

    @torch.no_grad()
    def reset() -> None:
        for parameter, value in zip(trained, first, strict=True):
            parameter.copy_(value)

    curve = _train(run, adapted, trained, keep, reset, dense=run.bf16)
    adapted.float()
    for name, form in run.forms.items():
        # weights that were stored in bf16 get the exact values of the start again
        place = run.placed[name]
        module = place.parameter.removesuffix(".weight")
        path = f"{module}.base_layer.weight" if module in modules else place.parameter
        part_of(run.model, Place(path, place.start), form.size).copy_(run.started(name))
    run.model = adapted.merge_and_unload()
    return curve


def _train(
    run: Run,
    model: nn.Module,
    parameters: list[nn.Parameter],
    keep: RunFolder,
    reset: Callable[[], None],
    *,
    dense: bool,
) -> Curve:
    """Train some parameters of a model; `reset` restores their initial values."""
    options = run.options

    def optimizer_of(lr: float) -> Optimizer:
        optimizer = make_optimizer(options.optimizer, parameters, lr)
        # biases and norms (vectors) do not decay, as in transformers' Trainer
        run.pull(optimizer, lambda w: own_part(w) if w.dim() > 1 else torch.zeros_like(own_part(w)))
        return optimizer

    def find() -> float:
        found = find_rate(run, model, optimizer_of, default_of(options), dense=dense)
        reset()
        return found

    lr = keep.number("lr", find) if options.lr == AUTO else options.lr
    assert lr is not None
    return run.phase(model, optimizer_of(float(lr)), steps=run.steps, dense=dense, folder=keep.below("checkpoints"))


def difference(run: Run) -> TaskVector:
    """Task vector from the start to the current weights, computed when it is read or saved.

    For full fine-tuning, eligible are all tensors of the model that are not excluded, else the eligible tensors of the
    run.
    """
    names = sorted(run.chosen(run.placed)) if run.options.method == "fft" else list(run.forms)
    tensors = {name: run.start.tensors[name] for name in names}
    forms = {name: info.form for name, info in tensors.items() if info.dtype.name in TORCH_DTYPES}
    specs = specs_of(run.start, forms, run.progress)
    return TaskVector(header_of(run.start, specs, {}), specs.values(), _Trained(run, list(specs)), checkpoint=run.start)


class _Trained(DeltaSource):
    """Source of trained − start, with the trained weights rounded to the dtypes of the start.

    If processes divide the model, each provides the ranges that it has.
    """

    def __init__(self, run: Run, names: list[str]) -> None:
        self._run = run
        self._names = names
        self.inputs = run.start.inputs

    @cached_property
    def content(self) -> str:
        changes = (self.change(name, 0, self._run.start.tensors[name].form.size) for name in self._names)
        return digest_of_entries(part for change in changes for part in (change.delta, change.replacements))

    def change(self, name: str, start: int, stop: int, base: Bits | None = None) -> Change:
        dtype = self._run.start.tensors[name].dtype
        before = self._run.start.bits(name, start, stop) if base is None else base[start:stop]
        first, _ = self._run.owned(name)
        return diff_range(dtype, before, bits_of(dtype, self._run.weight(name)[start - first : stop - first]))
