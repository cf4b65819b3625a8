"""Parameters that several processes share, as by `fully_shard`: each process has some of the rows.

Processes may also have the same rows, as replicas. Functions that exchange something must be called by all processes
that share the parameter, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from ..errors import TrainingError

Value = TypeVar("Value")


def discard_copies(model: nn.Module) -> None:
    """Discard copies of whole parameters that `fully_shard` may keep after a computation, as changes of them are lost.

    Args:
        model: The model.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a tensor that this process has: all of them, or those of its shard. No copy is made."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_range(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first flat position that this process has of a tensor, and the end.

    Args:
        name: The name of the tensor, for errors.
        tensor: The tensor.

    Raises:
        TrainingError: The tensor is divided in another way than by rows.
    """
    if not isinstance(tensor, DTensor):
        return 0, tensor.numel()
    divided = [axis for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not divided:
        return 0, tensor.numel()
    placement = tensor.placements[divided[0]]
    if len(divided) > 1 or type(placement) is not Shard or placement.dim != 0:
        raise TrainingError(
            f"parameter {name!r} is divided among processes as {tuple(tensor.placements)}: only a division by rows, as "
            "by fully_shard, is supported"
        )
    rows, inner = tensor.shape[0], math.prod(tensor.shape[1:])
    chunk = -(-rows // tensor.device_mesh.size(divided[0]))
    first = min(chunk * tensor.device_mesh.get_local_rank(divided[0]), rows)
    return first * inner, min(first + chunk, rows) * inner


def own_slice(name: str, tensor: torch.Tensor, start: int, size: int) -> tuple[int, int]:
    """Return the range that this process has of the flat elements [start, start + size) of a tensor, from their first.

    Args:
        name: The name of the tensor, for errors.
        tensor: The tensor.
        start: The first of the elements.
        size: How many they are.

    Raises:
        TrainingError: As in `own_range`.
    """
    low, high = own_range(name, tensor)
    return min(max(low - start, 0), size), min(max(high - start, 0), size)


def _group(tensor: DTensor) -> ProcessGroup:
    """The processes that have different rows of a tensor which `own_range` accepts."""
    divided = [axis for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return tensor.device_mesh.get_group(divided[0])


def parts_of(tensor: torch.Tensor, value: Value) -> list[Value]:
    """Return what each process that has other rows of a tensor gives, in the order of the rows.

    Args:
        tensor: The tensor. If it is not divided, only this process gives something.
        value: Anything that can be pickled.
    """
    if not isinstance(tensor, DTensor) or all(placement.is_replicate() for placement in tensor.placements):
        return [value]
    group = _group(tensor)
    found: list[Value] = [value] * distributed.get_world_size(group)
    distributed.all_gather_object(found, value, group=group)
    return found


def like_parts(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return a flat tensor that is divided among the processes like another one.

    Args:
        tensor: The other tensor. If it is not divided, the result is `own`.
        own: The part of this process, [n]. All parts have the same length.
    """
    if not isinstance(tensor, DTensor):
        return own
    return DTensor.from_local(own, tensor.device_mesh, tensor.placements, run_check=False)


def whole(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return all elements of a tensor. Processes that share it must call this together.

    Args:
        tensor: The tensor.
        own: The elements that this process has of it, flat, possibly with other values.

    Returns:
        Flat values on the same device.
    """
    if not isinstance(tensor, DTensor):
        return own
    local = own.view(own_part(tensor).shape)
    given = DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return given.full_tensor().reshape(-1)


def meshes_of(tensors: Iterable[torch.Tensor]) -> list[DeviceMesh]:
    """Return the groups of processes that share tensors, each once."""
    return list(dict.fromkeys(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)))


def agree(
    error: Exception | None,
    meshes: Iterable[DeviceMesh],
    otherwise: str = "could not change its weights, so none does",
) -> None:
    """Raise an error if this process or another one that shares the model has one. They must call this together.

    Args:
        error: The error of this process, if any.
        meshes: The groups of processes.
        otherwise: What is said of another process that has an error.

    Raises:
        Exception: `error`.
        TrainingError: Another process has an error.
    """
    failed = torch.tensor(int(error is not None))
    for mesh in meshes:
        failed = failed.to(mesh.device_type)
        for axis in range(mesh.ndim):
            distributed.all_reduce(failed, distributed.ReduceOp.MAX, group=mesh.get_group(axis))
    if error is not None:
        raise error
    if failed.item():
        raise TrainingError(f"another process that shares the model {otherwise}")
