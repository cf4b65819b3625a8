"""Edits: the elements of a parameter that a vector changes, decoded once and kept as tensors on the parameter's device.

Writing an edit, or undoing it, is one `index_copy_`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import BaseMismatchError
from .placement import same_bits


@dataclass(frozen=True)
class Edit:
    """The change of one parameter.

    Attributes:
        parameter: The name of the parameter in the model.
        indices: Flat positions, int32 [n], or int64 for parameters of 2^31 elements and more; increasing.
        old: The values before, [n], in the dtype of the parameter.
        new: The values after, [n], in the dtype of the parameter.
    """

    parameter: str
    indices: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor

    @property
    def nbytes(self) -> int:
        """The size of the three tensors."""
        return sum(tensor.nbytes for tensor in (self.indices, self.old, self.new))

    def put(self, flat: torch.Tensor, values: torch.Tensor) -> None:
        """Write values at the positions.

        The parameter may have been moved or cast since the edit was decoded.

        Args:
            flat: The parameter as a flat view.
            values: `old` or `new`.
        """
        flat.index_copy_(0, self.indices.to(flat.device, torch.int64), values.to(flat))

    def has(self, flat: torch.Tensor, values: torch.Tensor) -> bool:
        """Return whether the parameter has values at the positions, to the bit."""
        return same_bits(flat.index_select(0, self.indices.to(flat.device)), values.to(flat))

    def undo_in(self, weights: torch.Tensor, start: int) -> None:
        """Write the old values into a copy of a range of the parameter.

        Args:
            weights: The copy, [n].
            start: The position of its first element in the parameter.
        """
        ends = torch.tensor([start, start + len(weights)], dtype=self.indices.dtype, device=self.indices.device)
        low, high = torch.searchsorted(self.indices, ends).tolist()
        weights[(self.indices[low:high].long() - start).to(weights.device)] = self.old[low:high].to(weights)

    def meets(self, other: Edit) -> int:
        """Return the number of positions that two edits of one parameter share."""
        return int(torch.isin(self.indices, other.indices, assume_unique=True).sum())


def flat_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return parameters or buffers as flat views without gradients, by name."""
    known = dict(model.named_parameters(remove_duplicate=False))  # quicker than a walk for each name
    return {name: known[name].detach().view(-1) if name in known else flat_parameter(model, name) for name in names}


def flat_parameter(model: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer as a flat view without a gradient."""
    module, _, own = name.rpartition(".")
    owner: torch.Tensor = getattr(model.get_submodule(module), own)
    return owner.detach().view(-1)


def write(flats: Mapping[str, torch.Tensor], undone: Iterable[Edit], done: Iterable[Edit]) -> None:
    """Undo some edits, then write others. If this fails, the model keeps the values that it had.

    The weights are compared with the values that they should have before they are overwritten.

    Args:
        flats: The name of each parameter -> the parameter as a flat view.
        undone: Edits that are written into the model.
        done: Edits to write.

    Raises:
        BaseMismatchError: The weights at the positions of an edit are not those that it replaces.
    """
    before: list[tuple[Edit, torch.Tensor]] = []
    steps = [*((edit, edit.new, edit.old) for edit in undone), *((edit, edit.old, edit.new) for edit in done)]
    try:
        for edit, found, wanted in steps:
            flat = flats[edit.parameter]
            if not edit.has(flat, found):
                raise BaseMismatchError(
                    f"parameter {edit.parameter!r} of the model has other values than before where the vector changes "
                    "it: the weights were changed in the meantime; load the model again"
                )
            before.append((edit, found))
            edit.put(flat, wanted)
    except BaseException:
        for edit, values in reversed(before):
            edit.put(flats[edit.parameter], values)
        raise
