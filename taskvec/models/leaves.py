"""Sparse fine-tuning: train only the masked weights of a model, at a cost proportional to the number of entries.

Each masked weight matrix W has one leaf: a 1-D f32 parameter with its deltas. Backward passes fill W.grad as usual. A
hook copies the masked part into the leaf's .grad and frees W.grad at once, so that at most one dense gradient exists at
a time. Any torch optimizer can train the leaves, and its state is as small as they are. After each step,

    W[mask] = round(base[mask] + delta)

with the rounding of the dtype in which the base is stored. Training therefore sees the weights that a `.lota` file will
give, bit for bit, even if the model computes in a wider dtype. All other elements of W are never written.

A training loop that uses the leaves incorrectly would train nothing, and raises an error: at once if an optimizer, a
gradient or a parameter shows it, otherwise when the block ends or its result is requested.

This implements line "sparse fine-tuning" of LoTA, arXiv 2406.16797, Algorithm 1. Leaves are specific to this project.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import numpy as np
import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers.utils import SAFE_WEIGHTS_NAME

from taskvec_formats import Checkpoint, SparseTensor
from taskvec_formats.sparse import Indices

from ..arguments import instance
from ..errors import BaseMismatchError, MaskError, TrainingError, UsageError
from ..vectors.vector import TaskVector, vector_of
from .placement import TORCH_DTYPES, places, tensor_of

# ids of the parameters, and of the deltas, of all models inside a sparse_finetune block
_held: set[int] = set()


class Leaf:
    """Deltas of one masked weight matrix.

    Attributes:
        name: Name of the parameter.
        weight: The model's parameter, of any shape.
        shape: Shape of the parameter.
        indices: Flat masked positions, int32 or int64 [n], increasing.
        base: The base's values at these positions, [n], in the dtype in which they are stored.
        delta: The trainable nn.Parameter, f32 [n], initially zero.
        arrived: Whether a gradient has reached it.

    Args:
        name: Name of the parameter.
        weight: The model's parameter, of any shape.
        indices: Flat masked positions, int64 [n], increasing.
        base: The base's values at these positions. If None, the weight's own.
    """

    def __init__(self, name: str, weight: nn.Parameter, indices: Indices, base: torch.Tensor | None = None) -> None:
        self.name = name
        self.weight = weight
        self.shape = weight.shape
        # positions take half the memory in int32, and few matrices need more
        narrow = np.int32 if weight.numel() < 2**31 else np.int64
        self.indices = torch.from_numpy(indices.astype(narrow)).to(weight.device)
        self.base = self._flat(weight).index_select(0, self.indices) if base is None else base.to(weight.device)
        self.delta = nn.Parameter(torch.zeros(len(indices), dtype=torch.float32, device=weight.device))
        self.arrived = False
        self._written = self.delta._version  # version of the delta that was last written into the weight
        self._spent: int | None = None  # version of the gradient that an optimizer has used

    @staticmethod
    def _flat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().view(-1)

    def gather(self, weight: torch.Tensor) -> None:
        """Add the masked part of the dense gradient to the leaf's gradient, and free the dense gradient.

        Under torch.distributed, the gradient is averaged over all processes.

        Args:
            weight: The model's parameter, with its gradient.

        Raises:
            UsageError: The weight is not up to date, or the gradient of the last step was not cleared.
        """
        assert weight.grad is not None
        if not self.delta.requires_grad:  # frozen by the caller
            weight.grad = None
            return
        if self.changed() and self.missed():
            raise UsageError(
                f"the deltas of parameter {self.name!r} were changed, but not written into the model before the next "
                "backward pass: call tickets.scatter() after each update; optimizers that update several times in one "
                "step, such as LBFGS, are not supported"
            )
        self._written = self.delta._version
        if self.delta.grad is not None and self.delta.grad._version == self._spent:
            raise UsageError(
                f"the gradient of parameter {self.name!r} was not cleared after the optimizer's step: "
                "call optimizer.zero_grad() or tickets.zero_grad(), not model.zero_grad()"
            )
        self._spent = None
        self.arrived = True
        grad = weight.grad.reshape(-1).index_select(0, self.indices).float()
        if distributed.is_initialized():
            # DistributedDataParallel relies on autograd, which does not see the leaves
            distributed.all_reduce(grad.div_(distributed.get_world_size()))
        self.delta.grad = grad if self.delta.grad is None else self.delta.grad.add_(grad)
        weight.grad = None

    def spend(self) -> None:
        """Record that an optimizer has used the gradient, which must be cleared before the next one."""
        if self.delta.grad is not None:
            self._spent = self.delta.grad._version

    def scatter(self) -> None:
        """Write round(base + delta) into the weight."""
        self._flat(self.weight).index_copy_(0, self.indices.long(), self._tuned())
        self._written = self.delta._version

    def changed(self) -> bool:
        """Whether an operation has changed the delta since the weight was written. Changes through .data are not
        detected.
        """
        return self.delta._version != self._written

    def differing(self, among: slice) -> int:
        """Number of these entries at which the weight differs from the base, rounded to the weight's dtype."""
        held = self._flat(self.weight).index_select(0, self.indices[among])
        return _differing(held, self.base[among].to(self.weight.dtype))

    def missed(self) -> int:
        """Number of masked positions at which the weight differs from round(base + delta)."""
        return _differing(self._flat(self.weight).index_select(0, self.indices), self._tuned())

    def _tuned(self) -> torch.Tensor:
        return (_wide(self.base) + self.delta.detach()).to(self.base.dtype).to(self.weight.dtype)

    def follow(self) -> None:
        """Move to the device of the weight."""
        self.indices = self.indices.to(self.weight.device)
        self.base = self.base.to(self.weight.device)

    def entries(self) -> SparseTensor:
        """The deltas as they should be stored, f32.

        Bits of a delta below the f32 resolution of base + delta have no effect, but make the file larger. Each delta is
        therefore replaced by (base + delta) − base, unless that changes the sum.
        """
        base, delta = _wide(self.base).cpu().numpy(), self.delta.detach().cpu().numpy()
        total = base + delta.astype(base.dtype)
        short = (total - base).astype(np.float32)
        values = np.where(base + short.astype(base.dtype) == total, short, delta)
        return SparseTensor.owning(tuple(self.weight.shape), self.indices.cpu().numpy().astype(np.int64), values)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to f32, or keep f64: torch does not promote the 8-bit dtypes."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _differing(found: torch.Tensor, expected: torch.Tensor) -> int:
    """Number of positions at which two tensors of one dtype differ in value; −0.0 equals 0.0, all NaNs are equal."""
    found, expected = _wide(found), _wide(expected)
    return int(torch.count_nonzero((found != expected) & ~(found.isnan() & expected.isnan())))


class SparseModel(nn.Module):
    """A model whose only parameters are its leaves, for optimizers, training loops and transformers' Trainer.

    `sparse_finetune` creates it. Calling it calls the model, and other attributes, such as `config` or `generate`, are
    those of the model. Its state_dict contains the deltas and a digest of the mask, so checkpoints are as small as the
    entries. Loading a checkpoint of another mask raises MaskError.

    Attributes:
        leaves: Parameter name -> Leaf.
        origin: The base, or None if it is not known.
        deltas: The trainable parameters, f32 [n] each, by parameter name with "/" instead of ".".
        model: The dense model with its current weights under their own names, for code that saves or moves it. It is
            not a submodule.
    """

    def __init__(self, model: nn.Module, leaves: Mapping[str, Leaf], origin: Origin | None = None) -> None:
        super().__init__()
        self.leaves = dict(leaves)
        self.origin = origin
        self.deltas = nn.ParameterDict({name.replace(".", "/"): leaf.delta for name, leaf in leaves.items()})
        # not a submodule: its parameters must not be trained, saved in checkpoints or counted
        self.__dict__["model"] = model
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]
        self.train(model.training)
        uses = _uses(model)
        self._uses = {name: uses[id(leaf.weight)] for name, leaf in leaves.items()}
        self._open = True  # inside the `with` block
        self._trained = False  # whether leaves were written after a gradient arrived
        self._given = False  # whether they were written without a gradient: loaded, or set by the caller

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self.__dict__:  # while this object is being copied
                raise
            return getattr(self.__dict__["model"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
            TrainingError: A trained parameter of the model was replaced or moved.
        """
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._check_parameters()
        return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> SparseModel:
        """Set this module and the model to training or evaluation mode."""
        super().train(mode)
        self.model.train(mode)
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseModel:
        """Move the model and the leaves, as for `.to(device)`. Deltas stay f32."""
        self.model._apply(fn, recurse)
        for leaf in self.leaves.values():
            leaf.follow()
            leaf.delta.data = leaf.delta.data.to(leaf.weight.device)
            if self._open:
                leaf.scatter()  # a wider dtype represents base + delta more precisely
        return self

    def scatter(self) -> None:
        """Write all leaves into the model.

        This happens automatically after each step of an optimizer over the leaves and after load_state_dict. Call it
        after every other change of the deltas.

        Raises:
            UsageError: The block has ended.
        """
        self._check_open()
        if any(leaf.changed() or leaf.missed() for leaf in self.leaves.values()):
            self._write()

    def _check_open(self) -> None:
        if not self._open:
            raise UsageError("the sparse_finetune block has ended: its deltas are no longer written into the model")

    def _write(self) -> None:
        for leaf in self.leaves.values():
            leaf.scatter()
        if self._arrived():
            self._trained = True
        else:
            self._given = True

    def _arrived(self) -> bool:
        """Whether a gradient has reached any leaf."""
        return any(leaf.arrived for leaf in self.leaves.values())

    def _check_parameters(self) -> None:
        """Raise TrainingError, naming the parameter, if a masked parameter or its deltas were replaced or moved."""
        uses, own = _uses(self.model), {id(delta) for delta in self.parameters()}
        for name, leaf in self.leaves.items():
            if uses[id(leaf.weight)] < self._uses[name] or leaf.weight.shape != leaf.shape:
                raise TrainingError(
                    f"parameter {name!r} of the model was replaced inside the block, by an assignment, fully_shard or "
                    "a change of its size: change the model before sparse_finetune, and do not shard it"
                )
            if id(leaf.delta) not in own:
                raise TrainingError(
                    f"the deltas of parameter {name!r} were replaced, as fully_shard does: leaves cannot be sharded, "
                    "use DistributedDataParallel"
                )
            if leaf.weight.device != leaf.indices.device:
                raise TrainingError(
                    f"parameter {name!r} was moved to {leaf.weight.device} inside the block: call tickets.to(), which "
                    "moves the leaves too"
                )

    def _verify(self) -> None:
        """Raise TrainingError unless something was trained or loaded, and was written into the model.

        The model's weights are not checked after the block, because the caller may change them then.
        """
        if self._open:
            self._check_parameters()
        for name, leaf in self.leaves.items():
            if missed := leaf.missed() if self._open else leaf.changed():
                raise TrainingError(
                    f"parameter {name!r} is not its base plus its deltas"
                    + (f" at {missed} of {len(leaf.indices)} masked positions" if self._open else "")
                    + ": update the deltas alone, inside the block, by an optimizer over tickets.parameters() or with "
                    "tickets.scatter() after each update"
                )
        arrived = self._arrived()
        if not (self._trained if arrived else self._given):
            raise TrainingError(
                "nothing was trained: gradients arrived, but no optimizer over tickets.parameters() took a step; a "
                "loop that updates the deltas itself calls tickets.scatter() after each update"
                if arrived
                else "nothing was trained: no gradient reached the masked weights inside the block; compute a loss "
                "with tickets or its model and call backward() on it"
            )

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Raise UsageError if an optimizer would train masked parameters of the model directly."""
        masked = {id(leaf.weight): name for name, leaf in self.leaves.items()}
        for parameter in _parameters(optimizer):
            if id(parameter) in masked:
                raise UsageError(
                    f"{type(optimizer).__name__} holds the model's own parameter {masked[id(parameter)]!r}, which "
                    "trains through leaves: make the optimizer from tickets.parameters(), and give a Trainer "
                    "model=tickets, tickets being what sparse_finetune yields"
                )
        if self._held_by(optimizer):
            self._check_parameters()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Write the leaves into the model if an optimizer has trained some of them."""
        if stepped := self._held_by(optimizer):
            for leaf in stepped:
                leaf.spend()
            if self._arrived():
                self._write()

    def _held_by(self, optimizer: Optimizer) -> list[Leaf]:
        held = {id(parameter) for parameter in _parameters(optimizer)}
        return [leaf for leaf in self.leaves.values() if id(leaf.delta) in held]

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """Within the block, gradients and optimizer steps reach the leaves, and no other parameter of the model trains.

        Existing gradients of masked weights are dropped: they do not belong to a step of the leaves. Afterwards, every
        `requires_grad` is restored.
        """
        required = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        held = {id(parameter) for parameter in (*self.model.parameters(), *self.parameters())}
        handles = []
        try:
            _held.update(held)
            for parameter, _ in required:
                parameter.requires_grad_(False)
            for leaf in self.leaves.values():
                leaf.weight.requires_grad_(True)
                leaf.weight.grad = None
                handles.append(leaf.weight.register_post_accumulate_grad_hook(leaf.gather))
            handles.append(register_optimizer_step_pre_hook(self._before_step))
            handles.append(register_optimizer_step_post_hook(self._after_step))
            yield
        finally:
            _held.difference_update(held)
            for handle in handles:
                handle.remove()
            for parameter, requires_grad in required:
                parameter.requires_grad_(requires_grad)

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **_: Any,
    ) -> None:
        """Save the state_dict, deltas and digest of the mask, as model.safetensors. `Trainer.save_model` calls this.

        Load the file with `load_state_dict`. To save the dense model, call `tickets.model.save_pretrained(folder)`.
        Options of transformers' `save_pretrained` that are not listed here have no effect.

        Args:
            save_directory: The folder to write to.
            is_main_process: Whether to write at all.
            state_dict: The state_dict to write, if not that of this module.
            push_to_hub: Must be False.

        Raises:
            UsageError: `push_to_hub` is set.
        """
        if push_to_hub:
            self.push_to_hub()
        if is_main_process:
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            state = self.state_dict() if state_dict is None else dict(state_dict)
            save_file(state, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def push_to_hub(self, *_: Any, **__: Any) -> None:
        """Not supported, because the dense model or the task vector could be meant.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "tickets cannot be pushed to the Hub: write tickets.model.push_to_hub(...) for the dense model, or upload "
            "the file that tickets.vector().save(...) writes"
        )

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Not supported, because no model would use the deltas of a copy.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "tickets cannot be copied or pickled: copy.deepcopy(tickets.model) is a dense copy of the model, "
            "tickets.state_dict() contains the deltas, and tickets.vector().save(...) writes the task vector"
        )

    def entries(self) -> dict[str, SparseTensor]:
        """The trained entries as they are stored, by parameter name."""
        return {name: leaf.entries() for name, leaf in self.leaves.items()}

    def entries_by_tensor(self) -> dict[str, SparseTensor]:
        """The trained entries as they are stored, by the name of the tensor in the base.

        Raises:
            UsageError: No base was given.
            TrainingError: Nothing was trained.
        """
        if self.origin is None:
            raise UsageError("a task vector needs its base: sparse_finetune(model, masks, base)")
        self._verify()
        return self.origin.split(self.entries())

    def vector(self, provenance: Mapping[str, object] | None = None) -> TaskVector:
        """The task vector that was trained, which can be saved as a `.lota` file.

        Its eligible weights are those of the tensors in the mask.

        Args:
            provenance: Further entries of the vector's provenance.

        Raises:
            UsageError: No base was given.
            TrainingError: Nothing was trained.
        """
        deltas = self.entries_by_tensor()
        assert self.origin is not None
        base = self.origin.base
        forms = {name: base.tensors[name].form for name in deltas}
        return vector_of(base, forms, deltas, {"made_by": "sparse_finetune", **(provenance or {})})

    def get_extra_state(self) -> torch.Tensor:
        """Digest of the mask, uint8 [32]. It is part of the state_dict because deltas are meaningless without their
        mask.
        """
        digest = hashlib.sha256()
        for name, leaf in self.leaves.items():
            digest.update(f"{name} {list(leaf.weight.shape)}\n".encode())
            digest.update(leaf.indices.cpu().numpy().astype("<i8").tobytes())
        return torch.tensor(list(digest.digest()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Check that a checkpoint has the same mask.

        Raises:
            MaskError: The digest is that of another mask.
        """
        if not torch.equal(state.cpu(), self.get_extra_state()):
            raise MaskError("the checkpoint was trained with another mask")


def _after_load(sparse: SparseModel, keys: _IncompatibleKeys) -> None:
    """Write loaded deltas into the model. Raises MaskError for an incomplete state dict, even if not strict."""
    for key in keys.missing_keys:
        if "deltas." in key or key.endswith("_extra_state"):
            raise MaskError(f"the checkpoint is not one of these leaves: it has no {key!r}")
    sparse._check_open()
    sparse._write()


def _parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _uses(model: nn.Module) -> Counter[int]:
    """Number of names that the model has for each parameter, by id."""
    return Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))


def _like(model: nn.Module, leaves: Mapping[str, Leaf], origin: Origin | None) -> SparseModel:
    """Create a SparseModel whose class has the name and signature of the model's: Trainer inspects them for labels."""

    @wraps(type(model).forward)
    def forward(self: SparseModel, *args: Any, **kwargs: Any) -> Any:
        return SparseModel.forward(self, *args, **kwargs)

    like: type[SparseModel] = type(type(model).__name__, (SparseModel,), {"forward": forward})
    return like(model, leaves, origin)


@contextmanager
def sparse_finetune(
    model: nn.Module, masks: Mapping[str, Indices] | TaskVector, base: Checkpoint | None = None
) -> Iterator[SparseModel]:
    """Train only the masked weights of `model` within a `with` block, through leaves.

    Any optimizer over `tickets.parameters()` trains the model in place: the leaves are written into it after each step.
    When the block ends, the hooks are removed, every `requires_grad` is restored, and the model keeps its trained
    weights.

    Args:
        model: The model to train.
        masks: Parameter name -> flat positions, int64 [n], increasing; or a task vector whose positions are used.
        base: The checkpoint that the model was loaded from. Training then sees weights rounded to the dtypes of the
            checkpoint, and `tickets.vector()` returns the task vector. If None, the model's own weights are the base.

    Yields:
        The `SparseModel` to train, called `tickets` here.

    Raises:
        MaskError: The model does not have a parameter of the mask, a parameter is masked under two names, or a mask
            does not fit its parameter.
        BaseMismatchError: The base does not have a masked parameter, or has other values at masked positions.
        TrainingError: A masked parameter is sharded or cannot be trained, or nothing was trained when the block ends.
        UsageError: The model is inside another block, or an optimizer over the model's own masked parameters takes a
            step within the block.
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
    if any(id(parameter) in _held for parameter in parameters.values()):
        raise UsageError("the model is in a sparse_finetune block already: leave that one first")
    _check(masks, parameters)
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # one name each, if tied
    masks = {names[id(parameters[name])]: indices for name, indices in masks.items()}
    origin = Origin(base, model, masks) if base else None
    leaves = {
        name: Leaf(name, parameters[name], indices, origin.values(name, indices) if origin else None)
        for name, indices in masks.items()
    }
    if origin:
        for leaf in leaves.values():
            origin.compare(leaf)
    del masks  # its 64-bit positions take twice the memory of the leaves' own
    sparse = _like(model, leaves, origin)
    for leaf in leaves.values():
        leaf.scatter()  # base + 0 is not always the base's bits: −0.0 + 0 is +0.0
    try:
        with sparse._hooked():
            yield sparse
        sparse._verify()  # not reached if an exception leaves the block
    finally:
        sparse._open = False


def _positions(name: str, indices: object) -> Indices:
    """Convert a mask to int64 [n]. Raises MaskError for anything but a list of integers."""
    try:
        found = np.asarray(indices)
    except (TypeError, ValueError) as error:
        raise MaskError(f"parameter {name!r}: its mask must be int64 [n] ({error})") from None
    if found.ndim != 1 or (len(found) and (found.dtype.kind not in "iu" or found.max() >= 1 << 63)):
        raise MaskError(f"parameter {name!r}: its mask must be int64 [n], found {found.dtype} {list(found.shape)}")
    return found.astype(np.int64, copy=False)


def _check(masks: Mapping[str, Indices], parameters: Mapping[str, nn.Parameter]) -> None:
    if not masks:
        raise MaskError("the mask contains no positions")
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
    if isinstance(parameter, DTensor):
        raise TrainingError(
            f"parameter {name!r} is a DTensor, sharded as by fully_shard: leaves need whole parameters, as "
            "DistributedDataParallel keeps them"
        )
    if parameter.is_meta:
        raise TrainingError(f"parameter {name!r} is on the meta device: it has no values")
    if not parameter.is_floating_point():
        raise TrainingError(f"parameter {name!r} is {parameter.dtype}, which cannot be trained")
    if not parameter.is_contiguous():
        raise TrainingError(f"parameter {name!r} is not contiguous in memory: leaves need it to be")


def _by_parameter(model: nn.Module, vector: TaskVector) -> dict[str, Indices]:
    """Parameter name -> the flat positions of a vector's entries; parts of a fused parameter are concatenated."""
    placed = places(model, {name: spec.form for name, spec in vector.specs.items()})
    pieces: dict[str, list[Indices]] = {}
    for name in vector:
        if name not in placed:
            raise MaskError(f"{vector.name} contains tensor {name!r}, which the model does not have")
    for name in sorted(vector, key=lambda name: placed[name].start):
        pieces.setdefault(placed[name].parameter, []).append(vector[name].indices + placed[name].start)
    return {parameter: np.concatenate(parts) for parameter, parts in pieces.items()}


class Origin:
    """The checkpoint that masked parameters come from.

    Attributes:
        base: The checkpoint.
        tensors: Tensor name -> Place, for the tensors of the masked parameters, sorted by name.

    Args:
        base: The checkpoint.
        model: The model loaded from it.
        parameters: Names of the masked parameters.

    Raises:
        BaseMismatchError: The checkpoint does not have a parameter, or has it in a dtype that cannot be trained.
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
        """Names of the tensors that make up a parameter, in their order in it."""
        owned = [name for name, place in self.tensors.items() if place.parameter == parameter]
        return sorted(owned, key=lambda name: self.tensors[name].start)

    def values(self, parameter: str, indices: Indices) -> torch.Tensor:
        """The base's values at flat positions of a parameter.

        Args:
            parameter: Name of the parameter.
            indices: Flat positions, int64 [n], increasing.

        Returns:
            [n], in the dtype in which the base stores them.
        """
        found = []
        for name in self.parts(parameter):
            info, start = self.base.tensors[name], self.tensors[name].start
            low, high = np.searchsorted(indices, (start, start + info.form.size))
            held = indices[low:high] - start
            # read only the range that contains the positions
            first, stop = (int(held[0]), int(held[-1]) + 1) if len(held) else (0, 0)
            found.append(tensor_of(info.dtype, self.base.bits(name, first, stop)[held - first]))
        return torch.cat(found)

    def compare(self, leaf: Leaf) -> None:
        """Check that the weight has the base's values at masked positions, rounded to the model's dtype as loading
        does.

        Args:
            leaf: The leaf of the weight.

        Raises:
            BaseMismatchError: A value differs. The message names the tensor.
        """
        positions = leaf.indices.cpu().numpy()
        for name in self.parts(leaf.name):
            start = self.tensors[name].start
            low, high = np.searchsorted(positions, (start, start + self.base.tensors[name].form.size))
            if differing := leaf.differing(slice(int(low), int(high))):
                raise BaseMismatchError(
                    f"tensor {name!r}: {differing} of {high - low} masked weights of the model are not those of "
                    f"{self.base.name}; load the model from its base"
                )

    def split(self, entries: Mapping[str, SparseTensor]) -> dict[str, SparseTensor]:
        """Regroup entries by parameter into entries by tensor."""
        return {
            name: entries[place.parameter].slice_range(place.start, place.start + form.size).reshaped(form.shape)
            for name, place in self.tensors.items()
            for form in (self.base.tensors[name].form,)
        }
