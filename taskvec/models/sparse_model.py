"""A module whose only parameters are the leaves of a model, for optimizers and training loops."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import numpy as np
import torch
from safetensors.torch import load as parsed
from safetensors.torch import save as serialised
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers.utils import SAFE_WEIGHTS_NAME

from taskvec_formats import SparseTensor
from taskvec_formats.sparse import Indices

from ..arguments import instance, real, whole
from ..errors import MaskError, TrainingError, UsageError
from ..vectors.vector import TaskVector, vector_of
from .leaf import Leaf
from .origin import Origin
from .regrowth import SHARE, WINDOW, Regrowth, Scores
from .sharding import agree, discard_copies, meshes_of, own_part, parts_of

_DIGEST = 32  # bytes of SHA-256
# ids of the parameters, and of the deltas, of all models inside a sparse_finetune block
_held: set[int] = set()


def is_in_a_block(model: nn.Module) -> bool:
    """Return whether a model is inside a `sparse_finetune` block."""
    return any(id(parameter) in _held for parameter in model.parameters())


class SparseModel(nn.Module):
    """A model whose only parameters are its leaves, for optimizers, training loops and transformers' Trainer.

    `sparse_finetune` creates it. Calling it calls the model, and other attributes, such as `config` or `generate`, are
    those of the model. Its state_dict contains the deltas and a digest of the mask, so checkpoints are as small as the
    entries. Loading a checkpoint of another mask raises MaskError.

    If processes share the model, the deltas are DTensors, and a state_dict has those of this process.
    torch.distributed.checkpoint saves and loads it, for the same number of processes.

    Attributes:
        leaves: Parameter name -> Leaf.
        origin: The base, or None if it is not known.
        deltas: The trainable parameters, f32 [n] each, by parameter name with "/" instead of ".".
        model: The dense model with its current weights under their own names, for code that saves or moves it. It is
            not a submodule.
        regrowth: What changes the mask during training; None if the mask is fixed.
    """

    def __init__(self, model: nn.Module, leaves: Mapping[str, Leaf], origin: Origin | None = None) -> None:
        super().__init__()
        self.leaves = dict(leaves)
        self.origin = origin
        self.deltas = nn.ParameterDict({name.replace(".", "/"): leaf.delta for name, leaf in leaves.items()})
        # not a submodule: its parameters must not be trained, saved in checkpoints or counted
        object.__setattr__(self, "model", model)
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]
        self.train(model.training)
        uses = _uses(model)
        self._meshes = meshes_of(leaf.weight for leaf in leaves.values())
        self._digest = self._digest_of_mask() if self._meshes else None  # needs all processes
        self._uses = {name: uses[id(leaf.weight)] for name, leaf in leaves.items()}
        self.regrowth: Regrowth | None = None
        self._open = True  # inside the `with` block
        self._trained = False  # whether leaves were written after a gradient arrived
        self._given = False  # whether they were written without a gradient: loaded, or set by the caller

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # before it is set
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
            TrainingError: A trained parameter of the model was replaced or moved.
        """
        if self._meshes:
            discard_copies(self.model)  # of weights before the last step
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
        if self._meshes:
            discard_copies(self.model)
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
                    "a change of its size: change the model before sparse_finetune"
                )
            if id(leaf.delta) not in own:
                raise TrainingError(
                    f"the deltas of parameter {name!r} were replaced, as fully_shard does: call fully_shard on the "
                    "model before sparse_finetune, not on its tickets"
                )
            if leaf.weight.device != leaf.indices.device:
                raise TrainingError(
                    f"parameter {name!r} was moved to {leaf.weight.device} inside the block: call tickets.to(), which "
                    "moves the deltas too"
                )

    def _verify(self) -> None:
        """Raise TrainingError unless something was trained or loaded, and was written into the model.

        The model's weights are not checked after the block, because the caller may change them then.
        """
        if self._meshes:
            discard_copies(self.model)
        error: Exception | None = None
        try:
            self._verify_own()
        except TrainingError as failure:
            error = failure
        agree(error, self._meshes, "did not train its part, so none has a result")

    def _verify_own(self) -> None:
        """As `_verify`, for the part of this process."""
        if self._open:
            self._check_parameters()
        for name, leaf in self.leaves.items():
            if missed := leaf.missed() if self._open else leaf.changed():
                raise TrainingError(
                    f"parameter {name!r} is not its base plus its deltas"
                    + (f" at {missed:,} of {len(leaf.indices):,} masked positions" if self._open else "")
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
                    "trains by the deltas of tickets: make the optimizer from tickets.parameters(), and give a Trainer "
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

    def regrow(
        self,
        optimizer: Optimizer,
        *,
        total_steps: int,
        every: int,
        share: float | None = None,
        window: int | None = None,
        excluded: Mapping[str, Indices] | None = None,
        scores: Scores | None = None,
    ) -> Regrowth:
        """Let the mask change during training (SpIEL, arXiv 2401.16405): drop and regrow entries every few steps.

        In each masked parameter, the entries with the smallest |delta| are dropped, and as many are grown at the
        positions with the largest summed gradients (`models.regrowth`). The number of entries of each parameter stays
        the same. Weights that leave the mask return to the base.

        Hooks on the optimizer do this: the loop calls nothing else. The state_dict of the tickets then contains the
        positions too. To continue a run, call this again, and load the state of the tickets and of the optimizer.

        Args:
            optimizer: The optimizer of all deltas.
            total_steps: Steps of training. The share falls linearly to zero over them.
            every: Steps between changes.
            share: Share of the entries to replace, at the start, in (0, 1]. None is 0.2.
            window: Steps before each change over which gradients are summed, at most `every`. None is 5, or `every` if
                that is less.
            excluded: Parameter name -> flat positions that never enter the mask, int64, increasing.
            scores: Choose each mask by scores instead, as LIFT does (arXiv 2506.00772): takes the name of a parameter
                and its current weights, and returns a tensor with a score of each. The mask then consists of the
                positions with the largest |score|, as many as before.

        Returns:
            An object whose `replaced` is the number of entries that were replaced so far; also `tickets.regrowth`.

        Raises:
            UsageError: An argument is out of range, the mask changes already, the optimizer does not train all deltas,
                or processes share or average the gradients of parts of the model.
            MaskError: The model does not have a parameter of `excluded`.

        The step of the optimizer that changes the mask raises UsageError if the state of the optimizer is not one
        number per delta, and BaseMismatchError if the model does not have the base's values at the new positions.
        """
        self._check_open()
        if self.regrowth is not None:
            raise UsageError("the mask of these tickets changes already: call regrow once")
        if scores is not None and (share is not None or window is not None):
            raise UsageError("`share` and `window` have no effect together with `scores`")
        share = SHARE if share is None else share
        window = min(WINDOW, whole("`every`", every)) if window is None else window
        for name, number in (("total_steps", total_steps), ("every", every), ("window", window)):
            if whole(f"`{name}`", number) < 1:
                raise UsageError(f"`{name}` must be greater than zero, found {number}")
        if not 0 < real("`share`", share) <= 1:
            raise UsageError(f"`share` must be above 0 and at most 1, found {share}")
        if window > every:
            raise UsageError(f"`window` must be at most `every`, found window {window}, every {every}")
        if every >= total_steps:
            raise UsageError(f"`every` must be below `total_steps`, found every {every}, total_steps {total_steps}")
        if len(self._held_by(optimizer)) < len(self.leaves):
            raise UsageError("the optimizer does not train all deltas: make it from tickets.parameters()")
        for name, leaf in self.leaves.items():
            divided = own_part(leaf.weight).numel() != leaf.weight.numel()
            if divided or (distributed.is_initialized() and not isinstance(leaf.weight, DTensor)):
                raise UsageError(
                    f"processes share parameter {name!r} or average its masked gradient alone: a mask changes during "
                    "training only if each process has whole parameters and their whole gradients"
                )
        self._digest = None  # changes from now on, and needs no other process
        self.regrowth = Regrowth(
            self.leaves,
            self.origin,
            optimizer,
            total_steps=total_steps,
            every=every,
            share=share,
            window=window,
            excluded=self._excluded(excluded or {}),
            scores=scores,
        )
        return self.regrowth

    def _excluded(self, excluded: Mapping[str, Indices]) -> dict[str, torch.Tensor]:
        """Positions by the names of the leaves, of which a tied parameter has another one."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        names = {id(leaf.weight): name for name, leaf in self.leaves.items()}
        found: dict[str, torch.Tensor] = {}
        for name, indices in excluded.items():
            if name not in parameters:
                raise MaskError(f"the model has no parameter {name!r}, which the excluded positions name")
            if (leaf := names.get(id(parameters[name]))) is not None:
                positions = torch.from_numpy(np.asarray(indices, np.int64)).to(parameters[name].device)
                found[leaf] = torch.cat([found[leaf], positions]).unique() if leaf in found else positions
        return found

    @contextmanager
    def block(self) -> Iterator[None]:
        """The block of `sparse_finetune`, within which gradients and steps of the model reach the leaves.

        Raises:
            TrainingError: Nothing was trained in the block.
        """
        try:
            with self._hooked():
                yield
            self._verify()  # not reached if an exception leaves the block
        finally:
            self._open = False
            if self.regrowth is not None:
                self.regrowth.end()

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

        Not supported if processes share the model: save the state_dict by torch.distributed.checkpoint.

        Load the file with `load_state_dict`. To save the dense model, call `tickets.model.save_pretrained(folder)`.
        Options of transformers' `save_pretrained` that are not listed here have no effect.

        Args:
            save_directory: The folder to write to.
            is_main_process: Whether to write at all.
            state_dict: The state_dict to write, if not that of this module.
            push_to_hub: Must be False.

        Raises:
            UsageError: `push_to_hub` is set, or processes share the model.
        """
        if self._meshes:
            raise UsageError(
                "each process has a part of the deltas, and no file has all of them: save tickets.state_dict() by "
                "torch.distributed.checkpoint, or the vector that tickets.vector() returns"
            )
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
        """The trained entries of this process as they are stored, by parameter name."""
        return {name: leaf.entries() for name, leaf in self.leaves.items()}

    def entries_by_tensor(self) -> dict[str, SparseTensor]:
        """The trained entries of this process as they are stored, by the name of the tensor in the base.

        Raises:
            UsageError: No base was given.
            TrainingError: Nothing was trained.
        """
        return self._origin().split(self.entries())

    def _origin(self) -> Origin:
        if self.origin is None:
            raise UsageError("a task vector needs its base: sparse_finetune(model, masks, base)")
        self._verify()
        return self.origin

    def vector(self, provenance: Mapping[str, object] | None = None) -> TaskVector:
        """The task vector that was trained, which can be saved as a `.lota` file.

        Its eligible weights are those of the tensors in the mask. If processes share the model, all of them call this,
        and each gets the whole vector, of which one may save it.

        Args:
            provenance: Further entries of the vector's provenance.

        Raises:
            UsageError: No base was given.
            TrainingError: Nothing was trained.
        """
        instance("provenance", provenance or {}, Mapping)
        origin = self._origin()
        entries = self.entries()
        if self._meshes:
            entries = {name: _joined(parts_of(leaf.weight, entries[name])) for name, leaf in self.leaves.items()}
        deltas, base = origin.split(entries), origin.base
        forms = {name: base.tensors[name].form for name in deltas}
        return vector_of(base, forms, deltas, {"made_by": "sparse_finetune", **(provenance or {})}, name="ticket")

    def get_extra_state(self) -> torch.Tensor:
        """Digest of the mask, uint8 [32]; if the mask changes during training, followed by the state of `regrowth` as a
        safetensors file. It is part of the state_dict because deltas are meaningless without their mask.
        """
        state = b"" if self.regrowth is None else serialised(self.regrowth.state_dict())
        return torch.frombuffer(bytearray((self._digest or self._digest_of_mask()) + state), dtype=torch.uint8)

    def _digest_of_mask(self) -> bytes:
        """SHA-256 of the mask. If processes share the model, it covers the digests of their parts."""
        digest = hashlib.sha256()
        for name, leaf in self.leaves.items():
            digest.update(f"{name} {list(leaf.weight.shape)}\n".encode())
            positions = leaf.indices.cpu().numpy().astype("<i8").tobytes()
            for part in parts_of(leaf.weight, hashlib.sha256(positions).digest()) if self._meshes else [positions]:
                digest.update(part)
        return digest.digest()

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Check that a checkpoint has the same mask. A mask that changes during training becomes that of the
        checkpoint.

        Raises:
            MaskError: The digest is that of another mask.
        """
        found = state.cpu().numpy().tobytes()
        if self.regrowth is not None and len(found) > _DIGEST:
            self.regrowth.load_state_dict(parsed(found[_DIGEST:]))
        if found[:_DIGEST] != (self._digest or self._digest_of_mask()):
            raise MaskError("the checkpoint was trained with another mask")


def _after_load(sparse: SparseModel, keys: _IncompatibleKeys) -> None:
    """Write loaded deltas into the model. Raises MaskError for an incomplete state dict, even if not strict."""
    for key in keys.missing_keys:
        if "deltas." in key or key.endswith("_extra_state"):
            raise MaskError(f"the state dict does not belong to this mask: it has no {key!r}")
    sparse._check_open()
    sparse._write()


def _joined(parts: list[SparseTensor]) -> SparseTensor:
    """Join the entries of several processes, whose positions count in the whole parameter."""
    indices, values = (
        np.concatenate(arrays) for arrays in zip(*((part.indices, part.values) for part in parts), strict=True)
    )
    return SparseTensor.owning(parts[0].shape, indices, values)


def _parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _uses(model: nn.Module) -> Counter[int]:
    """Number of names that the model has for each parameter, by id."""
    return Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))


def sparse_model(model: nn.Module, leaves: Mapping[str, Leaf], origin: Origin | None) -> SparseModel:
    """Create a SparseModel whose class has the name and signature of the model's: Trainer inspects them for labels."""

    @wraps(type(model).forward)
    def forward(self: SparseModel, *args: Any, **kwargs: Any) -> Any:
        return SparseModel.forward(self, *args, **kwargs)

    like: type[SparseModel] = type(type(model).__name__, (SparseModel,), {"forward": forward})
    return like(model, leaves, origin)
