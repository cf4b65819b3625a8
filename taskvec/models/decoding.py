"""Decoding of a vector for a model in memory: the elements that it changes, checked against the weights."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from taskvec_formats import Checkpoint, TensorSpec
from taskvec_formats.system.parallel import ordered_map

from ..applying.verified import Application, has_digests
from ..errors import BaseMismatchError, TrainingError
from ..reporting.progress import Progress, silent
from ..vectors.vector import TaskVector
from .edits import Edit
from .live import Edited, LiveModel
from .placement import parameter_at, same_bits, tensor_of
from .sharding import own_part, own_range


@dataclass(frozen=True)
class Decoded:
    """A vector that is decoded for a model.

    Attributes:
        name: The name of the vector.
        digest: Its digest.
        edits: One edit per parameter that it changes.
        size: The size of its tensors in bytes, on all processes that share the model: they must keep the same vectors.
    """

    name: str
    digest: str
    edits: tuple[Edit, ...]
    size: int

    @cached_property
    def nbytes(self) -> int:
        """The size of its tensors."""
        return sum(edit.nbytes for edit in self.edits)


def decode(
    model: nn.Module,
    vector: TaskVector,
    edited: Edited | None = None,
    base: Checkpoint | None = None,
    progress: Progress = silent,
    known: MutableMapping[str, str] | None = None,
) -> Decoded:
    """Decode a vector for a model, and check it against the weights. The model is not changed.

    Args:
        model: The model, without wrappers.
        vector: The vector or patch.
        edited: What is in the weights. The vector is decoded for the weights without it.
        base: The base on disk, to decode the vector with. The weights are then compared with its values.
        progress: Called for every tensor that is checked as a whole.
        known: As in `LiveModel`.

    Returns:
        The decoded vector.

    Raises:
        BaseMismatchError, AlreadyAppliedError, TrainingError, FormatError: As in `attach`.
    """
    specs = vector.specs.values()
    if vector.header.removed or any(spec.origin is None or spec.origin.shape != spec.shape for spec in specs):
        raise TrainingError(f"{vector.name} adds, removes or resizes tensors: apply it to the base and load the result")
    fits = None if base is None else Application(vector, base, progress)  # first: it names the base in errors
    live = LiveModel(model, {spec.name: spec.origin for spec in specs if spec.origin is not None}, edited, known)
    if live.is_shared:  # before threads compute digests, each process in another order
        for spec in specs:
            if not has_digests(spec):
                live.digest(spec.name)
    application = fits or Application(vector, live, progress)

    def part(spec: TensorSpec) -> Edit:
        edit = _part(model, live, application, spec)
        positions = edit.indices - live.placed[spec.name].start
        if base is not None and not same_bits(live.values(spec.name, positions), edit.old):
            raise BaseMismatchError(
                f"tensor {spec.name!r} of the model does not have the values of {base.name} where {vector.name} "
                "changes it: the model was loaded from elsewhere, or was changed"
            )
        return edit

    parts: dict[str, dict[int, Edit]] = {}
    found = (part(spec) for spec in specs) if live.is_shared else ordered_map(part, specs)
    with closing(found):
        for spec, edit in zip(specs, found, strict=True):
            place = live.placed[spec.name]
            others = parts.setdefault(place.parameter, {})
            first = others.setdefault(place.start, edit)
            if not (torch.equal(first.indices, edit.indices) and same_bits(first.new, edit.new)):
                raise TrainingError(
                    f"tensor {spec.name!r} is tied to another one, but {vector.name} changes them differently"
                )
    size = sum(edit.nbytes for of in parts.values() for edit in of.values())
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    edits = [_joined([of[start] for start in sorted(of)], model, names) for of in parts.values()]
    return Decoded(vector.name, vector.digest, tuple(edit for edit in edits if len(edit.indices)), size)


def _part(model: nn.Module, live: LiveModel, application: Application, spec: TensorSpec) -> Edit:
    """Decode the edit of one tensor, on the CPU."""
    place, dtype = live.placed[spec.name], live.dtype(spec.name)
    is_small = parameter_at(model, place.parameter).numel() < 1 << 31
    narrow = np.int32 if is_small else np.int64  # half the memory
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for number, (start, _) in enumerate(spec.form.blocks()):
        touched, before, after = application.touched(spec, number)
        old, new = (tensor_of(spec.dtype, bits) for bits in (before, after))
        found.append((torch.from_numpy((touched + (start + place.start)).astype(narrow)), old, new))
    if not found:
        nothing = torch.empty(0, dtype=dtype)
        return Edit(place.parameter, torch.empty(0, dtype=torch.int32), nothing, nothing)
    indices, old, new = map(_concatenated, zip(*found, strict=True))
    return Edit(place.parameter, indices, old.to(dtype), new.to(dtype))


def _concatenated(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _joined(parts: Sequence[Edit], model: nn.Module, names: Mapping[int, Sequence[str]]) -> Edit:
    """Join the edits of consecutive parts of a parameter, and move what this process has to the parameter's device."""
    name = parts[0].parameter
    parameter = parameter_at(model, name)
    known = names.get(id(parameter), ())
    for other in known:
        if ".original_module." in f".{other}":
            raise TrainingError(
                f"parameter {other!r} is kept by peft, and the model computes with a copy of it (modules_to_save): "
                "attach the vector before the adapter is added, or merge the adapter"
            )
    start, stop = own_range(name, parameter)
    indices, old, new = (_concatenated([getattr(part, field) for part in parts]) for field in ("indices", "old", "new"))
    if (start, stop) != (0, parameter.numel()):
        low, high = torch.searchsorted(indices, torch.tensor([start, stop], dtype=indices.dtype)).tolist()
        indices, old, new = indices[low:high] - start, old[low:high].clone(), new[low:high].clone()
    device = own_part(parameter).device
    return Edit(name, indices.to(device), old.to(device), new.to(device), len(known))
