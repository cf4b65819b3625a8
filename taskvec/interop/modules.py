"""The modules of a model that the tensors of a vector belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from taskvec_formats import Checkpoint

from ..errors import AdapterError, BaseMismatchError, KindError
from ..models.loading import empty_model
from ..models.placement import places
from ..quantised import hint
from ..vectors.vector import TaskVector

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Owner:
    """A module that a tensor belongs to.

    Attributes:
        name: The name of the module.
        parameter: The name of the parameter in the module.
        module: The module, without values.
    """

    name: str
    parameter: str
    module: nn.Module


@dataclass(frozen=True)
class Modules:
    """The model of a base, and the modules of its tensors.

    Attributes:
        model: The model. Its parameters are on the meta device.
        owners: Tensor of the vector -> the modules without submodules that it is a whole parameter of, several if they
            share it. Tensors without such a module, or that are a part of a fused parameter, are left out.
        tensors: Parameter or buffer of the model, also under its other names if it is tied -> tensor of the base.
    """

    model: PreTrainedModel
    owners: Mapping[str, list[Owner]]
    tensors: Mapping[str, str]


def modules_of(vector: TaskVector, base: Checkpoint) -> Modules:
    """Find the modules of the tensors that a vector changes.

    Args:
        vector: The vector.
        base: The model folder that it was taken from.

    Raises:
        AdapterError: The vector adds, removes or resizes a tensor, which an adapter cannot.
        BaseMismatchError: The vector has another base.
        KindError: It is a patch.
        TrainingError: transformers does not know the model.
    """
    if vector.kind != "vector":
        raise KindError(f"{vector.name} is a patch, which has no deltas: an adapter is made of a vector")
    if vector.base.fingerprint != base.fingerprint:
        raise BaseMismatchError(f"{vector.name} was taken from {vector.base.name}, not from {base.name}{hint(base)}")
    for name, spec in vector.specs.items():
        if spec.origin != spec.form:
            raise AdapterError(f"{vector.name} adds or resizes tensor {name!r}, which an adapter cannot")
    if vector.header.removed:
        raise AdapterError(f"{vector.name} removes tensor {vector.header.removed[0]!r}, which an adapter cannot")
    model, _ = empty_model(base.path, torch.float32)
    tensors = tensors_in(model, base)
    owners: dict[str, list[Owner]] = {}
    for parameter, name in tensors.items():
        module, _, own = parameter.rpartition(".")
        owner = Owner(module, own, model.get_submodule(module))
        # peft adapts and replaces modules, so those that contain others are of no use
        if name in vector.specs and not any(owner.module.children()):
            owners.setdefault(name, []).append(owner)
    return Modules(model, owners, tensors)


def tensors_in(model: PreTrainedModel, base: Checkpoint) -> dict[str, str]:
    """Return parameter or buffer of a model, also under its other names if it is tied -> tensor of the base.

    Parameters that several tensors are fused into are left out.

    Args:
        model: The model of the base.
        base: The base.

    Raises:
        TrainingError: A parameter has another shape than its tensor.
    """
    values = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    placed = places(model, {name: info.form for name, info in base.tensors.items()})
    by_value = {
        id(values[place.parameter]): name
        for name, place in placed.items()
        if tuple(values[place.parameter].shape) == base.tensors[name].shape
    }
    return {name: by_value[id(value)] for name, value in values.items() if id(value) in by_value}
