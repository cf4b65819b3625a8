"""Sparse leaves: train the masked weights of a model, and nothing else, at a cost that follows the number of entries.

For each masked weight matrix W there is one leaf, the 1-D f32 parameter of its deltas. Backward passes fill W.grad as
usual; a hook gathers its masked part into the leaf's .grad and frees it at once, so that no more than one dense
gradient is alive. Any torch optimizer runs on the leaves, its state as small as they are; after its step

    W[mask] = round(base[mask] + delta)

with the rounding of the dtype in which the base is stored, so that training sees the weights that a `.lota` file will
give, bit for bit, also where the model computes in a wider dtype. Every other element of W is never written.

LoTA, arXiv 2406.16797, Algorithm 1, line "sparse fine-tuning"; the leaves are this project's way to do it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from taskvec_formats import Checkpoint, SparseTensor
from taskvec_formats.sparse import Indices

from ..arguments import instance
from ..errors import BaseMismatchError, MaskError, UsageError
from ..vector import TaskVector, vector_of
from .models import TORCH_DTYPES, places, tensor_of


class Leaf:
    """One masked weight matrix.

    weight: the model's parameter, any shape. indices: flat masked positions, int64 [n], increasing.
    base: the base's values there, [n], in the dtype in which it is stored; the weight's own where None.
    delta: the trainable nn.Parameter, f32 [n], zero at first.
    """

    def __init__(self, weight: nn.Parameter, indices: Indices, base: torch.Tensor | None = None) -> None:
        self.weight = weight
        # positions take half the memory in int32, and few matrices need more
        narrow = np.int32 if weight.numel() < 2**31 else np.int64
        self.indices = torch.from_numpy(indices.astype(narrow)).to(weight.device)
        self.base = self._flat(weight).index_select(0, self.indices) if base is None else base.to(weight.device)
        self.delta = nn.Parameter(torch.zeros(len(indices), dtype=torch.float32, device=weight.device))

    @staticmethod
    def _flat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().view(-1)

    def gather(self, weight: torch.Tensor) -> None:
        """Move the masked part of the dense gradient into the leaf, adding to what is there, and free the rest.

        Under torch.distributed it is the mean over all processes.
        """
        assert weight.grad is not None
        grad = weight.grad.reshape(-1).index_select(0, self.indices).float()
        if distributed.is_initialized():
            # autograd knows nothing of the leaves, so DistributedDataParallel does not
            distributed.all_reduce(grad.div_(distributed.get_world_size()))
        self.delta.grad = grad if self.delta.grad is None else self.delta.grad.add_(grad)
        weight.grad = None

    def scatter(self) -> None:
        """Write round(base + delta) into the weight."""
        tuned = (self._wide_base() + self.delta.detach()).to(self.base.dtype).to(self.weight.dtype)
        self._flat(self.weight).index_copy_(0, self.indices.long(), tuned)

    def _wide_base(self) -> torch.Tensor:
        return self.base.to(torch.promote_types(self.base.dtype, torch.float32))

    def follow(self) -> None:
        """Go where the weight is."""
        self.indices = self.indices.to(self.weight.device)
        self.base = self.base.to(self.weight.device)

    def entries(self) -> SparseTensor:
        """The deltas as they should be stored, f32.

        Below the resolution of f32 around base + delta a delta's bits have no effect, yet they fill the file with
        noise. So each is replaced by (base + delta) − base, unless that would not give the same sum.
        """
        base, delta = self._wide_base().cpu().numpy(), self.delta.detach().cpu().numpy()
        total = base + delta.astype(base.dtype)
        short = (total - base).astype(np.float32)
        values = np.where(base + short.astype(base.dtype) == total, short, delta)
        return SparseTensor.owning(tuple(self.weight.shape), self.indices.cpu().numpy().astype(np.int64), values)


class SparseModel(nn.Module):
    """A model whose only parameters are its leaves: for optimizers, training loops and transformers' Trainer.

    Calling it calls the model; what it lacks itself, such as `config` or `generate`, is the model's too. Its state_dict
    holds the deltas and a digest of the mask: checkpoints are as small as the entries, and loading one of another mask
    raises MaskError. Made by `sparse_finetune`.
    leaves: parameter name -> Leaf. origin: the base, where it is known.
    """

    def __init__(self, model: nn.Module, leaves: Mapping[str, Leaf], origin: Origin | None = None) -> None:
        super().__init__()
        self.leaves = dict(leaves)
        self.origin = origin
        self.deltas = nn.ParameterDict({name.replace(".", "/"): leaf.delta for name, leaf in leaves.items()})
        # not a submodule: its parameters are not to be trained, moved to checkpoints or counted
        self.__dict__["model"] = model
        self.register_load_state_dict_post_hook(lambda module, _: module.scatter())  # type: ignore[no-untyped-call]
        self.train(model.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self.__dict__:  # while it is being copied
                raise
            return getattr(self.__dict__["model"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> SparseModel:
        """Set both to training or evaluation."""
        super().train(mode)
        self.model.train(mode)
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseModel:
        """`.to(device)` and its like: the model and the leaves move, deltas stay f32."""
        self.model._apply(fn, recurse)
        for leaf in self.leaves.values():
            leaf.follow()
            leaf.delta.data = leaf.delta.data.to(leaf.weight.device)
        return self

    def scatter(self) -> None:
        """Write all leaves into the model; done by itself after each step of an optimizer that holds them."""
        for leaf in self.leaves.values():
            leaf.scatter()

    def entries(self) -> dict[str, SparseTensor]:
        """Parameter name -> the trained entries, as they are stored."""
        return {name: leaf.entries() for name, leaf in self.leaves.items()}

    def entries_by_tensor(self) -> dict[str, SparseTensor]:
        """Tensor name in the base -> the trained entries. Raises UsageError where no base was given."""
        if self.origin is None:
            raise UsageError("a task vector needs its base: sparse_finetune(model, masks, base)")
        return self.origin.split(self.entries())

    def vector(self, provenance: Mapping[str, object] | None = None) -> TaskVector:
        """What was trained, to be saved as a `.lota` file; eligible are the tensors that the mask names.

        Raises UsageError where no base was given.
        """
        deltas = self.entries_by_tensor()
        assert self.origin is not None
        base = self.origin.base
        forms = {name: base.tensors[name].form for name in deltas}
        return vector_of(base, forms, deltas, {"made_by": "sparse_finetune", **(provenance or {})})

    def get_extra_state(self) -> torch.Tensor:
        """The digest of the mask, uint8 [32]: deltas mean nothing without it."""
        digest = hashlib.sha256()
        for name, leaf in self.leaves.items():
            digest.update(f"{name} {list(leaf.weight.shape)}\n".encode())
            digest.update(leaf.indices.cpu().numpy().astype("<i8").tobytes())
        return torch.tensor(list(digest.digest()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Raise MaskError unless it is this mask's."""
        if not torch.equal(state.cpu(), self.get_extra_state()):
            raise MaskError("the checkpoint was trained with another mask")


def _like(model: nn.Module, leaves: Mapping[str, Leaf], origin: Origin | None) -> SparseModel:
    """A SparseModel whose class has the name and the signature of the model's: Trainer looks there for labels."""
    forward = wraps(type(model).forward)(SparseModel.forward)
    like: type[SparseModel] = type(type(model).__name__, (SparseModel,), {"forward": forward})
    return like(model, leaves, origin)


@contextmanager
def sparse_finetune(
    model: nn.Module, masks: Mapping[str, Indices] | TaskVector, base: Checkpoint | None = None
) -> Iterator[SparseModel]:
    """Within the `with` block only the masked weights of `model` train, through leaves.

    masks: parameter name -> flat positions, int64 [n], increasing; or a task vector, whose positions are meant.
    base: the checkpoint that the model was loaded from. Training then sees its weights as rounded to the dtype in which
        the checkpoint keeps them, and `tickets.vector()` gives the task vector. Left out, the model's own weights are
        the base.
    Any optimizer over `tickets.parameters()` trains the model in place: leaves are scattered after each of its steps.
    On leaving, the hooks are gone, every `requires_grad` is as before, and the model keeps its trained weights.
    Raises MaskError, naming it, for a parameter that the model does not have, that is masked twice under two names, or
    whose mask does not fit, and BaseMismatchError for one that the base does not have.
    """
    instance("model", model, nn.Module)
    if base is not None:
        instance("base", base, Checkpoint)
    if isinstance(masks, TaskVector):
        masks = _by_parameter(model, masks)
    instance("masks", masks, Mapping)
    masks = {name: _positions(name, indices) for name, indices in masks.items()}
    masks = {name: indices for name, indices in masks.items() if len(indices)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    required = [(parameter, parameter.requires_grad) for parameter in parameters.values()]
    _check(masks, parameters)
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # one name each, if tied
    masks = {names[id(parameters[name])]: indices for name, indices in masks.items()}
    origin = Origin(base, model, masks) if base else None
    leaves = {
        name: Leaf(parameters[name], indices, origin.values(name, indices) if origin else None)
        for name, indices in masks.items()
    }
    del masks  # 64-bit positions, which nobody may need now, take twice the memory of the leaves' own
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    handles = []
    for leaf in leaves.values():
        leaf.weight.requires_grad_(True)
        handles.append(leaf.weight.register_post_accumulate_grad_hook(leaf.gather))
    sparse = _like(model, leaves, origin)
    ours = {id(leaf.delta) for leaf in leaves.values()}

    def after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
        if any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"]):
            sparse.scatter()

    handles.append(register_optimizer_step_post_hook(after_step))
    sparse.scatter()  # base + 0 is not always the base's bits: −0.0 + 0 is +0.0
    try:
        yield sparse
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)


def _positions(name: str, indices: object) -> Indices:
    """A mask as int64 [n]. Raises MaskError for what is no list of whole numbers."""
    try:
        found = np.asarray(indices)
    except (TypeError, ValueError) as error:
        raise MaskError(f"parameter {name!r}: its mask must be int64 [n] ({error})") from None
    if found.ndim != 1 or (len(found) and (found.dtype.kind not in "iu" or found.max() >= 1 << 63)):
        raise MaskError(f"parameter {name!r}: its mask must be int64 [n], found {found.dtype} {list(found.shape)}")
    return found.astype(np.int64, copy=False)


def _check(masks: Mapping[str, Indices], parameters: Mapping[str, nn.Parameter]) -> None:
    if not masks:
        raise MaskError("the mask holds no position")
    owners: dict[int, str] = {}
    for name, indices in masks.items():
        if name not in parameters:
            raise MaskError(f"the model has no parameter {name!r}, which the mask names")
        if (other := owners.setdefault(id(parameters[name]), name)) != name:
            raise MaskError(f"parameters {other!r} and {name!r} are one: mask it once")
        size = parameters[name].numel()
        if indices[0] < 0 or indices[-1] >= size or (np.diff(indices) <= 0).any():
            raise MaskError(f"parameter {name!r}: its mask must hold increasing positions below {size}")


def _by_parameter(model: nn.Module, vector: TaskVector) -> dict[str, Indices]:
    """Parameter name -> the flat positions that a vector holds, parts of a fused parameter put together."""
    placed = places(model, {name: spec.form for name, spec in vector.specs.items()})
    pieces: dict[str, list[Indices]] = {}
    for name in vector:
        if name not in placed:
            raise MaskError(f"{vector.name} holds tensor {name!r}, which the model does not have")
    for name in sorted(vector, key=lambda name: placed[name].start):
        pieces.setdefault(placed[name].parameter, []).append(vector[name].indices + placed[name].start)
    return {parameter: np.concatenate(parts) for parameter, parts in pieces.items()}


class Origin:
    """The checkpoint that masked parameters come from: base. tensors: tensor name -> Place, theirs only, by name.

    Raises BaseMismatchError for a parameter that the checkpoint does not have.
    """

    def __init__(self, base: Checkpoint, model: nn.Module, parameters: Iterable[str]) -> None:
        self.base = base
        placed = places(model, {name: info.form for name, info in base.tensors.items()})
        wanted = set(parameters)
        self.tensors = {name: placed[name] for name in sorted(placed) if placed[name].parameter in wanted}
        for parameter in sorted(wanted):
            if not (parts := self.parts(parameter)):
                raise BaseMismatchError(f"{base.name} has no tensor for parameter {parameter!r}")
            if any(base.tensors[name].dtype.name not in TORCH_DTYPES for name in parts):
                raise BaseMismatchError(f"tensor {parts[0]!r} of {base.name} is of a dtype that cannot be trained")

    def parts(self, parameter: str) -> list[str]:
        """The tensors that make up a parameter, in their order there."""
        owned = [name for name, place in self.tensors.items() if place.parameter == parameter]
        return sorted(owned, key=lambda name: self.tensors[name].start)

    def values(self, parameter: str, indices: Indices) -> torch.Tensor:
        """The base's values at flat positions of a parameter, [n], in the dtype in which it is stored."""
        found = []
        for name in self.parts(parameter):
            info, start = self.base.tensors[name], self.tensors[name].start
            low, high = np.searchsorted(indices, (start, start + info.form.size))
            held = indices[low:high] - start
            # no more is read than the range in which the positions lie
            first, stop = (int(held[0]), int(held[-1]) + 1) if len(held) else (0, 0)
            found.append(tensor_of(info.dtype, self.base.bits(name, first, stop)[held - first]))
        return torch.cat(found)

    def split(self, entries: Mapping[str, SparseTensor]) -> dict[str, SparseTensor]:
        """Entries by parameter as entries by tensor."""
        return {
            name: entries[place.parameter].within(place.start, place.start + form.size).reshaped(form.shape)
            for name, place in self.tensors.items()
            for form in (self.base.tensors[name].form,)
        }
