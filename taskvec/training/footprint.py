"""Estimate of the peak memory of training, from the model, the data and the options.

With P weights in the model, N of them trained, k entries, and o numbers of optimizer state per trained weight (2 for
adam and adamw, 1 for rmsprop, 0 for sgd), in bytes:

- process: on a CPU, the measured memory of the process without the model
- model: 4·P, or 2·P if it is stored in bf16
- gradients: 4·N; with low memory, those of one parameter
- optimizer: 4·o·N; with low memory 2·N, and 2·N more if the model is in bf16
- mask, if the criterion sums gradients: 4·N; if it approximates weight matrices, while the mask is chosen: 4 for each
  number in the factors, the arrays for the largest tensor (`Criterion.memory`), and 8·k for the positions
- ticket: (12 + 4·o)·k for delta, gradient, optimizer state and position, and the bytes of k base values
- mask that changes during training: 16·k for the candidates; if it is chosen again, the arrays for the largest tensor
- adapters: (8 + 4·o) for each of their weights
- methods without a mask: 8 for each weight whose change is written at the end
- activations: what one short example stores for the backward pass, scaled to the tokens of the largest batch; the
  logits of a completion's tokens are counted separately, with their gradient

Gradients and activations do not exist at the same time unless gradients are accumulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ..data.pairs import collator_of
from ..data.rows import IGNORED, Row, pad_id
from .run import Run

STATE = {"rmsprop": 1, "adam": 2, "adamw": 2, "sgd": 0}  # numbers of optimizer state per trained weight
WRITTEN = 8  # bytes per weight whose change is written
POSITION = 8  # bytes per position of a mask
_TOKENS = 61  # of the measured example; odd, so that it equals no width of a layer


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass stores for the backward pass.

    Attributes:
        token: Per token of a batch.
        logit: Per token whose logits are computed.
        constant: Copies of weights.
        crops: Whether the model computes logits for completions only.
    """

    token: float
    logit: float
    constant: int
    crops: bool

    def of(self, tokens: int, completions: int) -> int:
        """Bytes for a batch.

        Args:
            tokens: Number of tokens in the batch.
            completions: How many of them belong to completions.
        """
        return round(self.token * tokens + self.logit * (completions if self.crops else tokens)) + self.constant


def activations(run: Run, *, dense: bool) -> Activations:
    """Measure activations on the end of the longest row, on the CPU. The model is left in training mode.

    Args:
        run: The run.
        dense: Whether weights are stored in f32 while the arithmetic may be bf16.
    """
    row = _shortened(max(run.rows, key=lambda row: len(row["input_ids"])))
    model = run.model
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0))  # type: ignore[union-attr,operator]
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    owned |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    shapes = {tuple(sorted(parameter.shape)) for parameter in model.parameters() if parameter.dim() > 1}
    seen: dict[int, tuple[int, str]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kind = "copy" if tuple(sorted(tensor.shape)) in shapes else "token"
            kind = "logit" if vocabulary and tensor.shape[-1:] == (vocabulary,) else kind
            seen[storage.data_ptr()] = storage.nbytes(), kind
        held.append(tensor)  # keeps its address from being reused
        return tensor

    held: list[torch.Tensor] = []
    inputs = collator_of(model, pad_id(run.tokenizer))([row])
    model.train()
    with (
        _requiring_gradients(model),
        torch.random.fork_rng(),
        torch.autocast("cpu", torch.bfloat16, enabled=run.bf16 and dense),
        saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model(**inputs)
    sums = {kind: sum(size for size, found in seen.values() if found == kind) for kind in ("token", "logit", "copy")}
    length = len(row["input_ids"])
    columns = inputs.get("logits_to_keep", length)
    token, blocks = sums["token"] / length, _blocks(model)
    if run.options.gradient_checkpointing:
        width = int(getattr(model.config.get_text_config(), "hidden_size", 0))  # type: ignore[union-attr,operator]
        token = token / blocks + blocks * width * (2 if run.bf16 else 4)
    gradient = 4 * vocabulary  # of the logits, f32
    return Activations(token, sums["logit"] / columns + gradient, sums["copy"], "logits_to_keep" in inputs)


def _shortened(row: Row) -> Row:
    """The last _TOKENS tokens of a row, with at least one label."""
    short = {key: values[-_TOKENS:] for key, values in row.items()}
    if all(label == IGNORED for label in short["labels"]):
        short["labels"] = short["input_ids"]
    return short


@contextmanager
def _requiring_gradients(model: nn.Module) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _blocks(model: nn.Module) -> int:
    return max((len(module) for module in model.modules() if isinstance(module, nn.ModuleList)), default=1) or 1


@dataclass(frozen=True)
class Footprint:
    """Sizes that the phases of a run have in common.

    Attributes:
        process: Bytes of the process without a model.
        weights: P, number of weights of the model.
        width: Bytes per weight in the model.
        largest: Number of weights of the largest trained parameter.
        batch: Bytes of the activations of the largest batch.
        accumulates: Whether gradients are accumulated over several backward passes.
        wide_step: Whether the optimizer works on all parameters at once, which takes as much memory again as their
            gradients.
    """

    process: int
    weights: int
    width: int
    largest: int
    batch: int
    accumulates: bool
    wide_step: bool

    def peak(self, *, kept: int, gradients: int) -> int:
        """Peak memory of a phase in bytes.

        Args:
            kept: Bytes stored throughout the phase, besides the model.
            gradients: Bytes of all gradients.
        """
        one = 4 * self.largest
        backward = self.batch + one + (gradients if self.accumulates else 0)
        step = gradients + (gradients if self.wide_step else one)
        return self.process + self.width * self.weights + kept + max(backward, step)

    def choosing(self, *, kept: int, scoring: int) -> int:
        """Peak memory in bytes while a mask is chosen from weights that are read from disk.

        Args:
            kept: Bytes kept until the mask is chosen.
            scoring: Bytes of the tensor that takes most.
        """
        return self.process + self.width * self.weights + kept + scoring


def lora_weights(run: Run) -> int:
    """Number of weights of the adapters: rank · (rows + columns) of each matrix."""
    matrices = [parameter.shape for parameter in run.parameters().values() if parameter.dim() == 2]
    return sum(run.options.rank * sum(shape) for shape in matrices)
