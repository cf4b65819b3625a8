"""Application of task vectors to a live model, and exact restoration of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from taskvec_formats import Checkpoint

from ..applying.verified import Application
from ..arguments import instance
from ..errors import BaseMismatchError, TrainingError
from ..vectors.vector import TaskVector
from .placement import Place, part_of, places, same_bits, values_of


@contextmanager
def applied(model: nn.Module, vector: TaskVector, base: Checkpoint) -> Iterator[None]:
    """Apply a vector to a model within a `with` block. Afterwards the model has its own bits again.

    Only the elements that the vector touches are saved for restoration, so nothing dense is copied.

    Args:
        model: The model, loaded from `base`.
        vector: The task vector.
        base: The checkpoint of the model.

    Raises:
        BaseMismatchError: The vector does not fit the base, or an element that it touches does not have the base's bits
            in the model.
        FormatError: A file cannot be read.
        TrainingError: The model lacks a parameter, or the vector adds, removes or resizes tensors.
    """
    instance("model", model, nn.Module)
    specs = vector.specs.values()
    if vector.header.removed or any(spec.origin is None or spec.origin.shape != spec.shape for spec in specs):
        raise TrainingError(f"{vector.name} adds, removes or resizes tensors: apply it to the base and load the result")
    application = Application(vector, base)
    placed = places(model, {spec.name: spec.form for spec in specs})
    kept: list[tuple[Place, int, torch.Tensor, torch.Tensor]] = []
    changed: set[Place] = set()  # tied weights have two names but are changed only once
    try:
        for name, spec in vector.specs.items():
            if name not in placed:
                raise TrainingError(f"the model has no parameter for tensor {name!r}")
            flat = part_of(model, placed[name], spec.size)
            for number, (start, _) in enumerate(spec.form.blocks()):
                touched, before, after = application.touched(spec, number)
                indices = torch.from_numpy(touched + start).to(flat.device)
                old, new = (torch.from_numpy(values_of(spec.dtype, bits)).to(flat) for bits in (before, after))
                if not same_bits(flat[indices], new if placed[name] in changed else old):
                    raise BaseMismatchError(
                        f"tensor {name!r} of the model does not have the values of {base.name} where {vector.name} "
                        "changes it: another vector is on it, or the model was loaded from elsewhere"
                    )
                kept.append((placed[name], spec.size, indices, flat[indices]))
                flat[indices] = new
            changed.add(placed[name])
        yield
    finally:
        for place, size, indices, values in reversed(kept):  # in reverse: tied weights may have been set twice
            flat = part_of(model, place, size)  # the model may have been moved or cast within the block
            flat[indices.to(flat.device)] = values.to(flat)
