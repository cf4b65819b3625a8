"""Models that several processes divide by `fully_shard` (FSDP2). Each process reads its own rows of every weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from taskvec_formats import Checkpoint

from ..errors import TrainingError
from .loading import empty_model, load_model
from .placement import Place, experts_in_lists, places
from .sharding import own_part, own_range, own_slice
from .states import NAMES

_DTYPES = {name: dtype for dtype, name in NAMES.items()}  # of safetensors -> of torch


def load_divided(
    start: Checkpoint, path: Path, dtype: torch.dtype, mesh: DeviceMesh, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Any]:
    """Load the language model of a folder, of which each process has a part, and its tokenizer.

    A process holds its own rows of the weights, which it reads from `start`, and while it computes, those of one block.
    A model whose weights transformers converts when it loads them, for example by transposing them, is loaded whole
    first, as `load_model` does.

    Args:
        start: The checkpoint with the weights.
        path: The model folder.
        dtype: The dtype of the weights.
        mesh: The processes. The weights are divided along its last axis, and the same along others.
        trust_remote_code: As in `load_model`.

    Returns:
        (model, tokenizer).

    Raises:
        UsageError, TrainingError: As in `load_model`.
    """
    model, tokenizer = empty_model(path, dtype, trust_remote_code=trust_remote_code)
    placed = places(model, {name: info.form for name, info in start.tensors.items()})
    check_divisible(model, path)
    missing = _missing(model, start, placed)
    if missing or _keeps_dtypes(model, dtype):
        model, tokenizer = load_model(path, dtype, trust_remote_code=trust_remote_code)
        placed = places(model, {name: info.form for name, info in start.tensors.items()})
        divide(model, mesh)
        fill(model, start, placed)  # `start` may differ from the folder
        return model, tokenizer
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    divide(model, mesh)
    model.to_empty(device=mesh.device_type)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    fill(model, start, placed)
    return model.eval(), tokenizer


def divide(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the weights of a model among processes, by rows. Gradients are averaged over all of them, in f32.

    Args:
        model: The model.
        mesh: The processes.
    """
    device = torch.device(mesh.device_type)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    experts = experts_in_lists(model)
    for block in _blocks(model):
        if inside := [each for each in block.modules() if any(each is one for one in experts)]:
            block.register_forward_hook(partial(_with_all, inside))
        _shard(block, mesh, policy)
    _shard(model, mesh, policy)
    if all(not parameter.is_meta for parameter in model.parameters()):
        model.to(device)


def _shard(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Apply `fully_shard`, which makes a class of another name; transformers finds its conversions by the name."""
    kind = type(module)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    type(module).__name__, type(module).__module__ = kind.__name__, kind.__module__


def check_divisible(model: PreTrainedModel, path: Path) -> None:
    """Check that several processes compute the same blocks of a model.

    Args:
        model: The model.
        path: Its folder, for messages.

    Raises:
        TrainingError: The model skips blocks at random, and processes would skip different ones.
    """
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(model.config.get_text_config(), name, 0):
            raise TrainingError(
                f"{path} skips blocks at random ({name} in its config), which several processes cannot do together: "
                f"set {name} to 0, or train in one process"
            )


def _with_all(experts: list[nn.Module], block: nn.Module, inputs: Any, output: Any) -> Any:
    """Add zero times the weights of all experts to the output of a block.

    The processes reduce the gradients of a block together, so an expert needs one in each, also in processes whose
    tokens were all routed to others.
    """
    if not torch.is_grad_enabled():
        return output
    trained = [parameter for each in experts for parameter in each.parameters() if parameter.requires_grad]
    zero = [0 * parameter.view(-1)[:1].sum() for parameter in trained]
    leaves, form = tree_flatten(output)
    for place, leaf in enumerate(leaves):
        if zero and isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            leaves[place] = leaf + torch.stack(zero).sum().to(leaf.dtype)
            break
    return tree_unflatten(leaves, form)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose weights are gathered together: the repeated blocks, unless they share weights."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    taken: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__ in kinds and not name.startswith(tuple(taken)):
            own = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
            if own and all(uses[each] == count for each, count in own.items()):
                taken.append(f"{name}.")
                yield module


def _missing(model: nn.Module, start: Checkpoint, placed: dict[str, Place]) -> list[str]:
    """Names of the parameters that the tensors of a checkpoint do not fill."""
    left = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, place in placed.items():
        if place.parameter in left:
            left[place.parameter] -= start.tensors[name].form.size
    return [name for name, size in left.items() if size]


def _keeps_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether transformers loads some weights of a model in f32, whatever the dtype of the others is."""
    return dtype != torch.float32 and bool(
        getattr(model, "_keep_in_fp32_modules_strict", None) or getattr(model, "_keep_in_fp32_modules", None)
    )


@torch.no_grad()
def fill(model: nn.Module, start: Checkpoint, placed: dict[str, Place]) -> None:
    """Set the weights of a divided model to those of a checkpoint, rounded to their dtypes.

    Args:
        model: The model.
        start: The checkpoint.
        placed: Tensor name -> Place, for the tensors to read.

    Raises:
        TrainingError: A tensor has a dtype that cannot be converted.
    """
    owners = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, place in placed.items():
        info, owner = start.tensors[name], owners[place.parameter]
        if info.dtype.name not in _DTYPES:
            raise TrainingError(f"tensor {name!r} is {info.dtype.name}, which cannot be loaded")
        low, _ = own_range(place.parameter, owner)
        first, stop = own_slice(place.parameter, owner, place.start, info.form.size)
        if first < stop:
            values = own_part(owner).view(-1)[place.start + first - low : place.start + stop - low]
            bits = torch.from_numpy(start.bits(name, first, stop).view(f"i{info.dtype.itemsize}").copy())
            values.copy_(bits.view(_DTYPES[info.dtype.name]))
