"""The weights of a model in memory, read as a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from taskvec_formats import Checkpoint, Form
from taskvec_formats.container import TensorInfo
from taskvec_formats.dtypes import BitArray, DType

from ..errors import BaseMismatchError, TrainingError
from .edits import Edit, plain
from .memory import MemoryCheckpoint
from .placement import TORCH_DTYPES, bits_of, parameter_at, places
from .sharding import meshes_of, own_part, whole

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Edited(Protocol):
    """What is written into a model, possibly by another thread."""

    @property
    def is_private(self) -> bool:
        """Whether no other thread writes into the model, so that weights can be read without a copy."""

    @property
    def written(self) -> Sequence[Edit]:
        """The edits that are written into the model."""

    def read(self, weights: Callable[[Iterable[Edit]], torch.Tensor]) -> torch.Tensor:
        """Read weights while nothing is written.

        Args:
            weights: Copies weights, given the edits that are written into the model. It may be called again.
        """


class LiveModel(MemoryCheckpoint):
    """Some tensors of a model in memory, under the names and in the dtypes of its checkpoint.

    Args:
        model: The model, without wrappers.
        forms: Tensor name -> Form in the checkpoint.
        edited: What is written into the model. The tensors read as if it were not. None if nothing is.
        known: Digests of tensors that are known already. Further ones are added to it.

    Attributes:
        placed: Tensor name -> Place.

    Raises:
        TrainingError: The model has no parameter for a tensor, or one of another shape.
    """

    def __init__(
        self,
        model: nn.Module,
        forms: Mapping[str, Form],
        edited: Edited | None = None,
        known: MutableMapping[str, str] | None = None,
    ) -> None:
        super().__init__("the model", {name: TensorInfo.computed(forms[name]) for name in sorted(forms)})
        self.placed = places(model, forms)
        for name in forms:
            if name not in self.placed:
                raise TrainingError(f"the model has no parameter for tensor {name!r}")
        self._model = model
        self._known = {} if known is None else known
        self._edited = edited

    def digest(self, name: str) -> str:
        """Compute the digest of a tensor, or look it up."""
        if name not in self._known:
            self._known[name] = super().digest(name)
        return self._known[name]

    @property
    def is_shared(self) -> bool:
        """Whether several processes have parts of the model, and must read its tensors together and in one order."""
        return bool(meshes_of(self._model.parameters()))

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor in the model."""
        return parameter_at(self._model, self.placed[name].parameter).dtype

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """Read the elements [start, stop) of a tensor.

        Raises:
            BaseMismatchError: The model holds the tensor in a narrower dtype than the checkpoint, or its values have
                no equal in the dtype of the checkpoint.
        """
        form = self.tensors[name].form
        return stored_bits(name, form.dtype, self._shown(name, start, form.size if stop is None else stop))

    def values(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Return the weights of a tensor at some positions, on the CPU, in the dtype of the model.

        Args:
            name: The tensor.
            indices: Flat positions in the tensor, int64 [n].
        """
        weights = self._shown(name, 0, self.tensors[name].form.size)
        return weights[indices.to(weights.device)].cpu()

    def _shown(self, name: str, start: int, stop: int) -> torch.Tensor:
        place = self.placed[name]
        low, high = place.start + start, place.start + stop
        parameter = parameter_at(self._model, place.parameter)
        is_shared = isinstance(parameter, DTensor)
        part = own_part(parameter).view(-1)
        part, first = (part, 0) if is_shared else (part[low:high], low)

        def without(edits: Iterable[Edit]) -> torch.Tensor:
            shown = part.clone()
            for edit in edits:
                if plain(edit.parameter) == plain(place.parameter):
                    edit.undo_in(shown, first)
            return shown

        if self._edited is None or (self._edited.is_private and not self._edited.written):
            shown = part
        else:
            shown = self._edited.read(without)
        return whole(parameter, shown)[low:high] if is_shared else shown


def stored_bits(name: str, dtype: DType, weights: torch.Tensor) -> BitArray:
    """Return weights in the dtype of their checkpoint.

    Args:
        name: The name of the tensor, for messages.
        dtype: The dtype in the checkpoint.
        weights: The weights, [n], in that dtype or a wider one that represents all its values.

    Returns:
        Carriers, [n].

    Raises:
        BaseMismatchError: The dtype of the weights is narrower, or a weight is not a number of `dtype`.
    """
    if dtype.name not in TORCH_DTYPES:
        raise TrainingError(f"tensor {name!r} is {dtype.name}: only floating-point tensors of a model can be changed")
    stored = TORCH_DTYPES[dtype.name]
    bits = bits_of(dtype, weights)
    if weights.dtype == stored:
        return bits
    if _is_narrower(weights.dtype, stored):
        raise BaseMismatchError(
            f"tensor {name!r} is {_NAMES[weights.dtype]} in the model and {dtype.name} in its checkpoint: the rounded "
            "weights cannot be checked without the base (`base`)"
        )
    again = torch.from_numpy(bits.view(f"i{dtype.itemsize}")).view(stored).to(weights.dtype)
    same = (again == weights.cpu()) | (again.isnan() & weights.cpu().isnan())
    if not bool(same.all()):
        raise BaseMismatchError(
            f"tensor {name!r}: {int(torch.count_nonzero(~same))} weights of the model are not numbers of {dtype.name}, "
            "the dtype in its checkpoint"
        )
    return bits


def _is_narrower(held: torch.dtype, stored: torch.dtype) -> bool:
    return torch.promote_types(held, stored) != held and stored.itemsize > 1


def is_rounded(model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Return whether a model holds tensors of its checkpoint in a dtype that does not represent all their values.

    Args:
        model: The model, without wrappers.
        checkpoint: The checkpoint that it was loaded from.
    """
    forms = {name: info.form for name, info in checkpoint.tensors.items() if info.form.dtype.name in TORCH_DTYPES}
    held = dict(model.named_parameters(remove_duplicate=False))
    return any(
        _is_narrower(held[place.parameter].dtype, TORCH_DTYPES[forms[name].dtype.name])
        for name, place in places(model, forms).items()
        if place.parameter in held
    )
