"""Edits: the elements of a parameter that a vector changes, decoded once and kept as tensors on the parameter's device.

Writing an edit, or undoing it, is one `index_copy_`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import nn

from taskvec_formats.system.parallel import threads

from ..errors import AlreadyAppliedError, BaseMismatchError
from .placement import carriers, check_readable
from .sharding import own_part

_PARALLEL = 1 << 17  # entries from which on starting threads is worth its time
_MOST_THREADS = 8  # more do not make memory faster


@dataclass(frozen=True)
class Edit:
    """The change of one parameter.

    Attributes:
        parameter: The name of the parameter in the model.
        indices: Flat positions in the part of the parameter that this process has, int32 [n], or int64 for parameters
            of 2^31 elements and more; increasing.
        old: The values before, [n], in the dtype of the parameter.
        new: The values after, [n], in the dtype of the parameter.
        names: The number of names that the parameter has in the model, more than one if it is tied; 0 for a buffer.
    """

    parameter: str
    indices: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor
    names: int = 1

    @property
    def nbytes(self) -> int:
        """The size of the three tensors."""
        return sum(tensor.nbytes for tensor in (self.indices, self.old, self.new))

    @cached_property
    def _views(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.indices, carriers(self.old), carriers(self.new)

    def like(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the indices and the carriers of the values before and after, for a parameter as it is now.

        It may have been moved or cast since the edit was decoded.

        Args:
            flat: The parameter as a flat view.
        """
        if flat.dtype == self.old.dtype and flat.device == self.indices.device:
            return self._views
        return self.indices.to(flat.device), carriers(self.old.to(flat)), carriers(self.new.to(flat))

    def undo_in(self, weights: torch.Tensor, start: int) -> None:
        """Write the old values into a copy of a range of the parameter.

        Args:
            weights: The copy, [n].
            start: The position of its first element in the parameter.
        """
        ends = torch.tensor([start, start + len(weights)], dtype=self.indices.dtype, device=self.indices.device)
        low, high = torch.searchsorted(self.indices, ends).tolist()
        indices, old, _ = self.like(weights)
        put(carriers(weights), indices[low:high] - start if start else indices[low:high], old[low:high])

    def meets(self, other: Edit) -> int:
        """Return the number of positions that two edits of one parameter share."""
        return int(torch.isin(self.indices, other.indices, assume_unique=True).sum())


_Taken = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # carriers of a parameter, positions, carriers before


def edited_parameters(
    model: nn.Module, known: Mapping[str, torch.Tensor], edits: Iterable[Edit]
) -> dict[str, torch.Tensor]:
    """Return the parameters or buffers that edits change, as flat views of what this process has of them.

    Args:
        model: The model. It may have been wrapped or changed since the edits were decoded.
        known: Its parameters under all of their names.
        edits: The edits.

    Returns:
        Name in the edit -> flat view without a gradient.

    Raises:
        BaseMismatchError: A parameter no longer exists, or is no longer tied to the same number of others.
        TrainingError: It is on the meta device or is not contiguous.
    """
    names = Counter(map(id, known.values()))
    found: dict[str, torch.Tensor] = {}
    for edit in edits:
        if edit.parameter in found:
            continue
        parameter = known[edit.parameter] if edit.parameter in known else _elsewhere(model, known, edit.parameter)
        if names[id(parameter)] != edit.names:
            raise BaseMismatchError(
                f"parameter {edit.parameter!r} of the model was tied or untied after the vector was decoded: it had "
                f"{edit.names} names, and has {names[id(parameter)]} now"
            )
        check_readable(edit.parameter, parameter)
        found[edit.parameter] = own_part(parameter).view(-1)
    return found


def _elsewhere(model: nn.Module, known: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return a buffer, or a parameter whose layer was put into a layer of peft or taken out of one in the meantime."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for names in (buffers, {plain(other): tensor for other, tensor in known.items()}):
        if (tensor := names.get(plain(name))) is not None:
            return tensor
    raise BaseMismatchError(
        f"the model no longer has a parameter {name!r}: its layer was replaced or wrapped after the vector was decoded"
    )


def plain(name: str) -> str:
    """Return the name of a parameter without the layers that peft puts around it."""
    return name.replace(".base_layer.", ".")


def put(bits: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    """Write carriers into the carriers of a parameter.

    Args:
        bits: The carriers of the parameter, flat.
        indices: Flat positions, [n].
        values: Carriers, [n].
    """
    if bits.device.type == "cpu" and _scatters_int32():
        bits.scatter_(0, indices, values)
    else:
        bits.index_copy_(0, indices.to(torch.int64), values)


@cache
def _scatters_int32() -> bool:
    """Return whether this version of torch takes int32 positions here, so that they need not be converted."""
    try:
        torch.zeros(1).scatter_(0, torch.zeros(1, dtype=torch.int32), torch.zeros(1))
    except RuntimeError:
        return False
    return True


def write(flats: Mapping[str, torch.Tensor], undone: Iterable[Edit], done: Iterable[Edit]) -> None:
    """Undo some edits, then write others. If this fails, the model keeps the values that it had.

    The weights are compared with the values that they should have before they are overwritten. On the CPU, several
    threads share the parameters, because most of the time passes with waiting for memory.

    Args:
        flats: The name of each parameter -> the parameter as a flat view.
        undone: Edits that are written into the model.
        done: Edits to write.

    Raises:
        BaseMismatchError: The weights at the positions of an edit are not those that it replaces.
        AlreadyAppliedError: They are those that it writes.
    """
    steps: dict[int, list[tuple[Edit, bool]]] = {}  # address of a parameter, which may have several names -> its edits
    for is_undone, edits in ((True, undone), (False, done)):
        for edit in edits:
            steps.setdefault(flats[edit.parameter].data_ptr(), []).append((edit, is_undone))
    sizes = {where: sum(len(edit.indices) for edit, _ in each) for where, each in steps.items()}
    waiting = deque(sorted(steps, key=lambda where: -sizes[where]))  # the largest first, for an even division
    taken: list[_Taken] = []
    is_inference = torch.is_inference_mode_enabled()  # a setting of the thread

    def work() -> None:
        with torch.inference_mode(is_inference):
            while True:
                try:
                    own = steps[waiting.popleft()]
                except IndexError:  # none is left
                    return
                _take(flats[own[0][0].parameter], own, taken)

    on_cpu = all(flat.device.type == "cpu" for flat in flats.values())
    helpers = min(threads(), _MOST_THREADS) - 1 if on_cpu and sum(sizes.values()) >= _PARALLEL else 0
    try:
        with ThreadPoolExecutor(max(helpers, 1)) as pool:  # without helpers, no thread is started
            others = [pool.submit(work) for _ in range(helpers)]
            try:
                work()
                for other in others:
                    other.result()
            finally:
                waiting.clear()  # after a failure, the others stop
    except BaseException:
        for bits, indices, found in reversed(taken):
            put(bits, indices, found)
        raise


def _take(flat: torch.Tensor, steps: Iterable[tuple[Edit, bool]], taken: list[_Taken]) -> None:
    """Undo or write the edits of one parameter, and list what each replaces before it does."""
    bits = carriers(flat)
    for edit, is_undone in steps:
        indices, old, new = edit.like(flat)
        found, wanted = (new, old) if is_undone else (old, new)
        try:
            held = bits.index_select(0, indices)
        except IndexError:
            raise BaseMismatchError(
                f"parameter {edit.parameter!r} of the model has only {len(bits):,} elements: it was resized or sharded "
                "after the vector was decoded"
            ) from None
        if not torch.equal(held, found):
            if not is_undone and torch.equal(held, wanted):
                raise AlreadyAppliedError(f"parameter {edit.parameter!r} of the model has the tuned values already")
            count = int(torch.count_nonzero(held != found))
            raise BaseMismatchError(
                f"parameter {edit.parameter!r} of the model has other values than before at {count:,} of the "
                f"{len(indices):,} positions that the vector changes: the weights were changed in the meantime; load "
                "the model again, or give a handle up with `forget`"
            )
        taken.append((bits, indices, found))
        put(bits, indices, wanted)
