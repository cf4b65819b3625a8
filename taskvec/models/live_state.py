"""What is attached to each model in memory, and the vectors that are decoded for it."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from taskvec_formats import Checkpoint

from ..errors import BaseMismatchError, TrainingError, UsageError
from ..reporting.progress import Progress
from ..vectors.vector import TaskVector
from .decoding import Decoded, decode
from .edits import Edit, flat_parameter, flat_parameters, write
from .sharding import agree, discard_copies, meshes_of

CACHE = 1 << 30  # default limit of the decoded vectors that a model keeps, in bytes


class Handle(Protocol):
    """What is known of a handle on the model (`attach.Attachment`)."""

    @property
    def name(self) -> str | None: ...
    @property
    def digest(self) -> str | None: ...
    @property
    def edits(self) -> tuple[Edit, ...]: ...
    @property
    def written(self) -> tuple[Edit, ...]: ...


class LiveState:
    """What is known of one model: the handles on it, and vectors that are decoded for it.

    Attributes:
        lock: Held while the weights or the handles are changed, and by users while the model computes.
        handles: The handles on the model.
        cache: Digest of a vector -> the decoded vector, the least recently used first.
        limit: The largest size of the cache in bytes; vectors that are attached are kept beyond it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        self.lock = RLock()
        self.handles: list[Handle] = []
        self.cache: OrderedDict[str, Decoded] = OrderedDict()
        self.limit = CACHE
        self._digests: dict[str, str] = {}  # tensor -> digest of its weights without what is attached
        self._parameters: dict[str, str] = {}  # tensor -> parameter
        self._counts: dict[str, object] = {}  # parameter -> count of its changes when those digests were computed
        self._version = 0  # number of changes for good
        self._writes = 0  # odd while something is written

    @property
    def model(self) -> nn.Module:
        """The model. Only a weak reference is kept, so that a model that nobody uses is freed."""
        model = self._model()
        if model is None:
            raise UsageError("the model of this handle no longer exists")
        return model

    @property
    def _meshes(self) -> list[DeviceMesh]:
        return meshes_of(self.model.parameters())

    def _is_unchanged(self, parameter: str, flat: torch.Tensor | None = None) -> bool:
        """Return whether nobody but this module has changed a parameter since digests of its tensors were computed.

        torch counts the changes of a tensor, but not those of inference tensors and those through `.data`.
        """
        if parameter not in self._counts or self._meshes:
            return False  # processes that share the model must come to the same result
        count = _count(flat_parameter(self.model, parameter) if flat is None else flat)
        return count is not None and self._counts[parameter] == count

    def read(self, weights: Callable[[Iterable[Edit]], torch.Tensor]) -> torch.Tensor:
        """Read weights while nothing is written, without the lock.

        The lock would make a thread wait for itself that holds it and decodes a vector in other threads.
        """
        while True:
            before = self._writes
            found = weights([edit for handle in self.handles for edit in handle.written])
            if before % 2 == 0 and before == self._writes:
                return found
            time.sleep(0.001)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock, and make threads that read wait."""
        with self.lock:
            self._writes += 1
            try:
                yield
            finally:
                self._writes += 1

    def write(self, undone: Sequence[Edit], done: Sequence[Edit]) -> None:
        """Undo edits and write others, within `writing`. The digests of the weights without them remain known.

        Raises:
            BaseMismatchError: As in `edits.write`.
        """
        discard_copies(self.model)
        flats = flat_parameters(self.model, {edit.parameter: None for edit in (*undone, *done)})
        unchanged = [parameter for parameter, flat in flats.items() if self._is_unchanged(parameter, flat)]
        try:
            self.together(lambda: write(flats, undone, done), lambda: write(flats, done, undone))
        finally:
            self._counts.update({parameter: _count(flats[parameter]) for parameter in unchanged})

    def together(self, action: Callable[[], None], back: Callable[[], None] = lambda: None) -> None:
        """Do something that only some of the processes that share the model may be able to do: all do it, or none.

        Args:
            action: What to do. It raises an error if it cannot be done.
            back: Reverses it.

        Raises:
            TrainingError: Another process could not do it.
        """
        error: Exception | None = None
        try:
            action()
        except (BaseMismatchError, UsageError) as found:
            error = found
        try:
            agree(error, self._meshes)
        except TrainingError:
            if error is None:
                back()
            raise

    def keep(self, decoded: Decoded) -> None:
        """Keep a decoded vector, and forget the least recently used ones beyond the limit."""
        with self.lock:
            self.cache[decoded.digest] = decoded
            self.cache.move_to_end(decoded.digest)
            needed = {decoded.digest, *(handle.digest for handle in self.handles)}
            size = sum(each.nbytes for each in self.cache.values())
            for digest in [digest for digest in self.cache if digest not in needed]:
                if size <= self.limit:
                    break
                size -= self.cache.pop(digest).nbytes

    def decode(self, vector: TaskVector, base: Checkpoint | None, progress: Progress) -> Decoded:
        """Decode a vector for the weights without what is attached, or take it from the cache.

        The lock is not held meanwhile, so the model can compute.
        """
        with self.lock:
            if (decoded := self.cache.get(vector.digest)) is not None:
                return decoded  # compared with the weights when it is written
            discard_copies(self.model)
            version = self._version
            digests = {
                name: digest for name, digest in self._digests.items() if self._is_unchanged(self._parameters[name])
            }
        decoded, places = decode(self.model, vector, self, base, progress, digests)
        with self.lock:
            if version == self._version:
                self._digests = digests
                self._parameters |= {name: place.parameter for name, place in places.items()}
                held = {self._parameters[name] for name in digests}
                self._counts |= {parameter: _count(flat_parameter(self.model, parameter)) for parameter in held}
        return decoded

    def forget(self) -> None:
        """Forget all vectors and digests, because the weights have changed for good."""
        self._version += 1
        self.cache.clear()
        self._digests.clear()


def _count(flat: torch.Tensor) -> object:
    """Return what changes when a parameter is changed or replaced; None if torch does not count it."""
    return None if flat.is_inference() else (flat._version, flat.dtype, flat.device, flat.data_ptr())


_STATES: WeakKeyDictionary[nn.Module, LiveState] = WeakKeyDictionary()
_STATES_LOCK = RLock()


def state_of(model: nn.Module) -> LiveState:
    """Return the state of a model without wrappers; the same one each time."""
    with _STATES_LOCK:
        if model not in _STATES:
            _STATES[model] = LiveState(model)
        return _STATES[model]
