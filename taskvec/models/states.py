"""Models and state dicts in memory as checkpoints, so that differences can be taken without a folder."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from taskvec_formats import Checkpoint, Form
from taskvec_formats.container import TensorInfo
from taskvec_formats.dtypes import DTYPES, BitArray

from ..arguments import said
from ..errors import TrainingError, UsageError
from ..reporting.progress import Progress
from ..reporting.throughput import hashed
from .memory import MemoryCheckpoint
from .placement import TORCH_DTYPES, raw_bits
from .wrappers import unwrapped

# torch dtype -> name in safetensors
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()} | {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
}


class StateCheckpoint(MemoryCheckpoint):
    """Tensors in memory. Their bits are read when they are asked for, so the tensors must not change before.

    Args:
        state: Tensor name -> tensor.
        name: The name for display.

    Raises:
        UsageError: A name is not a str, or a value is not a tensor.
        TrainingError: A tensor is sharded, sparse, on the meta device, or of a dtype that is not supported.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], name: str) -> None:
        for key in state:
            if not isinstance(key, str):
                raise UsageError(f"the names of a state dict must be of type str, found {said(key)}")
        super().__init__(name, {key: _info(key, state[key]) for key in sorted(state)})
        self._state = dict(state)

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """Read the elements [start, stop) of a tensor."""
        return raw_bits(self._state[name].detach().resolve_conj().resolve_neg().reshape(-1)[start:stop])

    def without_copies(self, names: Container[str]) -> StateCheckpoint:
        """Return the checkpoint without further names of tied tensors that another one does not have.

        Args:
            names: The names in the other one.
        """
        kept = {_memory(tensor) for name, tensor in self._state.items() if name in names}
        state = {name: tensor for name, tensor in self._state.items() if name in names or _memory(tensor) not in kept}
        return self if len(state) == len(self._state) else StateCheckpoint(state, self.name)

    def frozen(self, names: Iterable[str]) -> StateCheckpoint:
        """Return a checkpoint with the same digests and copies of some tensors, which later changes do not affect.

        Args:
            names: The tensors that will be read; others of them may not exist here.
        """
        copies = {name: self._state[name].detach().cpu().clone() for name in names if name in self._state}
        copy = StateCheckpoint({**self._state, **copies}, self.name)
        copy._state, copy._digests = copies, self.digests()
        return copy


def snapshots(
    base: object, tuned: object, opened: Callable[[str, object], Checkpoint], progress: Progress
) -> tuple[Checkpoint, Checkpoint]:
    """Return two models as checkpoints that later changes of models in memory do not affect.

    Args:
        base: The model before fine-tuning: a module, a state dict, or anything that `opened` takes.
        tuned: The model after fine-tuning.
        opened: Opens a checkpoint, given the name of the argument and its value.
        progress: Called while tensors are hashed.

    Raises:
        UsageError: A state dict is not one of the other module.
        TrainingError: A module is quantised or has adapters of peft, or a tensor is sharded or on the meta device.
    """
    found: list[Checkpoint] = []
    for what, model, other in (("base", base, tuned), ("tuned", tuned, base)):
        if isinstance(model, nn.Module):
            found.append(StateCheckpoint(_saved_state(model), type(unwrapped(model)).__name__))
        elif isinstance(model, Mapping):
            state = _state_like(other, model, what) if isinstance(other, nn.Module) else model
            found.append(StateCheckpoint(state, f"{what} (state dict)"))
        else:
            found.append(opened(what, model))
    for here, (model, own, other) in enumerate(((base, found[0], found[1]), (tuned, found[1], found[0]))):
        if isinstance(model, Mapping) and isinstance(own, StateCheckpoint):
            found[here] = own.without_copies(other.tensors)
    before, after = (hashed(each, what, progress) for what, each in zip(("base", "tuned"), found, strict=True))
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    one, two = (each.frozen(changed) if isinstance(each, StateCheckpoint) else each for each in found)
    return one, two


def _saved_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a model under the names in which `save_pretrained` writes them.

    Tied parameters appear once. Layers that transformers fuses on loading are separate again.

    Args:
        model: The model. Wrappers are looked through.

    Raises:
        TrainingError: The model is quantised, or has adapters of peft.
    """
    model = _without_adapters(model)
    return _as_saved(model, model.state_dict())


def _state_like(model: nn.Module, state: Mapping[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    """Return a state dict of a model under the names in which `save_pretrained` writes it.

    Args:
        model: The model.
        state: Tensors under the names of `model.state_dict()`, or under those of its checkpoint.
        what: The argument, for errors.

    Raises:
        UsageError: The state dict lacks a tensor of the model, or has another one.
    """
    model = _without_adapters(model)
    own = model.state_dict()
    expected = own if state.keys() & own.keys() == state.keys() else _saved_state(model)
    tied = own.keys() - _untied(model, own).keys()
    for name in sorted(state.keys() ^ expected.keys()):
        if name not in tied:
            verbs = ("lacks", "has") if name in expected else ("has", "lacks")
            raise UsageError(f"{what} {verbs[0]} tensor {name!r}, which {type(model).__name__} {verbs[1]}")
    return _as_saved(model, state) if expected is own else dict(state)


def _without_adapters(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers, if its weights alone are what it computes with."""
    inside = unwrapped(model)
    if hasattr(model, "peft_config") or hasattr(inside, "peft_config"):
        raise TrainingError(
            f"{type(inside).__name__} has adapters of peft, which are not weights of its checkpoint: merge them into "
            "the weights (`merge_and_unload`), or take them off (`unload`)"
        )
    return inside


def _as_saved(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = _untied(model, state)
    if not isinstance(model, PreTrainedModel):
        return found
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, found))


def _untied(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict of a model without the further names of tied parameters."""
    every = dict(model.named_parameters(remove_duplicate=False))
    once = dict(model.named_parameters())
    return {name: tensor for name, tensor in state.items() if name in once or name not in every}


def _memory(tensor: torch.Tensor) -> object:
    """Return what is equal for tensors that are views of the same elements."""
    return tensor.device, tensor.data_ptr() or id(tensor), tensor.dtype, tensor.shape, tensor.stride()


def _info(name: str, tensor: torch.Tensor) -> TensorInfo:
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"tensor {name!r} of a state dict must be a torch.Tensor, found {type(tensor).__name__}")
    if isinstance(tensor, DTensor):
        raise TrainingError(f"tensor {name!r} is a DTensor, sharded as by fully_shard: gather it first")
    if tensor.is_meta:
        raise TrainingError(f"tensor {name!r} is on the meta device: it has no values")
    if tensor.is_nested or tensor.layout != torch.strided:
        raise TrainingError(f"tensor {name!r} is nested or sparse ({tensor.layout}): only dense tensors are supported")
    if tensor.dtype not in NAMES:
        raise TrainingError(f"tensor {name!r} is {tensor.dtype}, which is not supported here")
    return TensorInfo.computed(Form(DTYPES[NAMES[tensor.dtype]], tuple(tensor.shape)))
