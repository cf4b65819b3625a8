"""Sparse fine-tuning: train only the masked weights of a model, at a cost proportional to the number of entries.

Each masked weight matrix W has one leaf: a 1-D f32 parameter with its deltas. Backward passes fill W.grad as usual. A
hook copies the masked part into the leaf's .grad and frees W.grad at once, so that at most one dense gradient exists at
a time. Any torch optimizer can train the leaves, and its state is as small as they are. After each step,

    W[mask] = round(base[mask] + delta)

with the rounding of the dtype in which the base is stored. Training therefore sees the weights that a `.lota` file will
give, bit for bit, even if the model computes in a wider dtype. All other elements of W are never written.

A training loop that uses the leaves incorrectly would train nothing, and raises an error: at once if an optimizer, a
gradient or a parameter shows it, otherwise when the block ends or its result is requested.

If processes share the model, as by `fully_shard`, each trains the masked weights among its own rows. Its parameters are
DTensors, which torch's optimizers and `clip_grad_norm_` support.

This implements line "sparse fine-tuning" of LoTA, arXiv 2406.16797, Algorithm 1. Leaves are specific to this project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from torch import nn

from taskvec_formats import Checkpoint
from taskvec_formats.sparse import Indices

from ..arguments import instance
from ..errors import MaskError, TrainingError, UsageError
from ..vectors.vector import TaskVector
from .leaf import Leaf
from .origin import Origin
from .placement import places
from .sharding import agree, discard_copies, meshes_of, own_range, own_slice, parts_of
from .sparse_model import SparseModel, is_in_a_block, sparse_model


@contextmanager
def sparse_finetune(
    model: nn.Module, masks: Mapping[str, Indices] | TaskVector, base: Checkpoint | None = None
) -> Iterator[SparseModel]:
    """Train only the masked weights of `model` within a `with` block, through leaves.

    Any optimizer over `tickets.parameters()` trains the model in place: the leaves are written into it after each step.
    When the block ends, the hooks are removed, every `requires_grad` is restored, and the model keeps its trained
    weights.

    If processes share the model, all of them call this, and later `tickets.vector()`, together.

    Args:
        model: The model to train.
        masks: Parameter name -> flat positions, int64 [n], increasing; or a task vector whose positions are used. The
            positions count in the whole parameter, even if processes share it; a process may leave out those of others.
        base: The checkpoint that the model was loaded from. Training then sees weights rounded to the dtypes of the
            checkpoint, and `tickets.vector()` returns the task vector. If None, the model's own weights are the base.

    Yields:
        The `SparseModel` to train, called `tickets` here.

    Raises:
        MaskError: The model does not have a parameter of the mask, a parameter is masked under two names, or a mask
            does not fit its parameter.
        BaseMismatchError: The base does not have a masked parameter, or has other values at masked positions.
        TrainingError: A masked parameter cannot be trained, or is shared by processes in another way than by rows; or
            nothing was trained when the block ends.
        UsageError: The model is inside another block, or an optimizer over the model's own masked parameters takes a
            step within the block.
    """
    instance("model", model, nn.Module)
    if base is not None:
        instance("base", base, Checkpoint)
    discard_copies(model)
    leaves: dict[str, Leaf] = {}
    error: Exception | None = None
    meshes = meshes_of(model.parameters())
    try:
        if isinstance(masks, TaskVector):
            masks = _by_parameter(model, masks)
        instance("masks", masks, Mapping)
        found = _own(model, {name: _positions(name, indices) for name, indices in masks.items()})
        del masks
    except Exception as failure:
        error = failure
    agree(error, meshes, _FAILED)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    lengths = {name: parts_of(parameters[name], len(indices)) for name, indices in found.items()}
    found = {name: indices for name, indices in found.items() if any(lengths[name])}
    if not found:
        raise MaskError("the mask contains no positions")
    try:
        origin = Origin(base, model, found) if base else None
        for name in list(found):
            indices = found.pop(name)  # 64-bit positions take twice the memory of the leaf's own
            values = origin.values(name, indices) if origin else None
            leaf = leaves[name] = Leaf(name, parameters[name], indices, values, max(lengths[name]))
            if origin:
                origin.compare(leaf)
    except Exception as failure:
        error = failure
    agree(error, meshes, _FAILED)
    sparse = sparse_model(model, leaves, origin)
    for leaf in leaves.values():
        leaf.scatter()  # base + 0 is not always the base's bits: −0.0 + 0 is +0.0
    with sparse.block():
        yield sparse


_FAILED = "could not prepare its part of the mask, so none trains"


def _own(model: nn.Module, masks: Mapping[str, Indices]) -> dict[str, Indices]:
    """Check masks, and return the positions that this process has, under one name of each parameter.

    Raises:
        MaskError: As in `sparse_finetune`.
        TrainingError: As in `sparse_finetune`.
        UsageError: The model is inside another block.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if is_in_a_block(model):
        raise UsageError("the model is in a sparse_finetune block already: leave that one first")
    _check({name: indices for name, indices in masks.items() if len(indices)}, parameters)
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # one name each, if tied
    found: dict[str, Indices] = {}
    for name, indices in masks.items():
        if name in parameters:
            low, high = np.searchsorted(indices, own_range(name, parameters[name]))
            found.setdefault(names[id(parameters[name])], indices[low:high])
    return found


def _positions(name: str, indices: object) -> Indices:
    """Convert a mask to int64 [n]. Raises MaskError for anything but a list of integers."""
    try:
        found = np.asarray(indices)
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises RuntimeError for a tensor with a gradient
        raise MaskError(f"parameter {name!r}: its mask must be int64 [n] ({error})") from None
    if found.ndim != 1 or (len(found) and (found.dtype.kind not in "iu" or found.max() >= 1 << 63)):
        raise MaskError(f"parameter {name!r}: its mask must be int64 [n], found {found.dtype} {list(found.shape)}")
    return found.astype(np.int64, copy=False)


def _check(masks: Mapping[str, Indices], parameters: Mapping[str, nn.Parameter]) -> None:
    owners: dict[int, str] = {}
    for name, indices in masks.items():
        if name not in parameters:
            raise MaskError(f"the model has no parameter {name!r}, which the mask names")
        if (other := owners.setdefault(id(parameters[name]), name)) != name:
            raise MaskError(f"parameters {other!r} and {name!r} are the same parameter: mask it once")
        size = parameters[name].numel()
        if indices[0] < 0 or indices[-1] >= size or (np.diff(indices) <= 0).any():
            raise MaskError(f"parameter {name!r}: its mask must contain increasing positions below {size}")
        _check_trainable(name, parameters[name])


def _check_trainable(name: str, parameter: nn.Parameter) -> None:
    if parameter.is_meta:
        raise TrainingError(f"parameter {name!r} is on the meta device: it has no values")
    if not parameter.is_floating_point():
        raise TrainingError(f"parameter {name!r} is {parameter.dtype}, which cannot be trained")
    if not parameter.is_contiguous():
        raise TrainingError(f"parameter {name!r} is not contiguous in memory, which sparse fine-tuning requires")


def _by_parameter(model: nn.Module, vector: TaskVector) -> dict[str, Indices]:
    """Parameter name -> the flat positions of a vector's entries that this process has.

    Parts of a fused parameter are concatenated. Only the entries of this process are decoded.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    placed = places(model, {name: spec.form for name, spec in vector.specs.items()})
    pieces: dict[str, list[Indices]] = {}
    for name in vector:
        if name not in placed:
            raise MaskError(f"{vector.name} contains tensor {name!r}, which the model does not have")
    for name in sorted(vector, key=lambda name: placed[name].start):
        parameter, start, size = placed[name].parameter, placed[name].start, vector.specs[name].size
        # a buffer is not among the parameters, which `_check` reports
        held = parameters.get(parameter)
        first, stop = (0, size) if held is None else own_slice(name, held, start, size)
        pieces.setdefault(parameter, []).append(vector.change(name, first, stop).delta.indices + first + start)
    return {parameter: np.concatenate(parts) for parameter, parts in pieces.items()}
