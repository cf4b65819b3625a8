"""The checkpoint that the parameters of a model come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn

from taskvec_formats import Checkpoint, SparseTensor
from taskvec_formats.sparse import Indices

from ..errors import BaseMismatchError
from .leaf import Leaf
from .placement import TORCH_DTYPES, places, tensor_of


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
        positions = leaf.first + leaf.indices.cpu().numpy().astype(np.int64)
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
