"""What is attached to each model in memory, and the vectors that are decoded for it."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from taskvec_formats import Checkpoint
from taskvec_formats.system.signals import deferred_signals

from ..errors import TaskvecError, TrainingError, UsageError
from ..reporting.progress import Progress
from ..vectors.vector import TaskVector
from .decoding import Decoded, decode
from .edits import Edit, edited_parameters, write
from .sharding import agree, discard_copies, meshes_of

CACHE = 1 << 30  # default limit of the decoded vectors that a model keeps, in bytes


class Handle(Protocol):
    """What is known of a handle on the model (`attach.Attachment`)."""

    @property
    def name(self) -> str | None: ...
    @property
    def decoded(self) -> Decoded | None: ...
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
        is_private: Whether nobody else changes the model, nor attaches vectors to it in another thread. Digests of its
            tensors are then remembered, and weights are read without a copy. torch does not count all changes, so this
            cannot be found out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        self.lock = RLock()
        self.handles: list[Handle] = []
        self.cache: OrderedDict[str, Decoded] = OrderedDict()
        self.limit = CACHE
        self.is_private = False
        self._digests: dict[str, str] = {}  # tensor -> digest of its weights without what is attached
        self._cache_lock = Lock()  # vectors are decoded by threads that do not wait for `lock`
        self._writes = 0  # odd while something is written

    @property
    def model(self) -> nn.Module:
        """The model. Only a weak reference is kept, so that a model that nobody uses is freed."""
        model = self._model()
        if model is None:
            raise UsageError("the model of this handle no longer exists")
        return model

    @property
    def written(self) -> list[Edit]:
        """The edits that are written into the model."""
        return [edit for handle in self.handles for edit in handle.written]

    def read(self, weights: Callable[[Iterable[Edit]], torch.Tensor]) -> torch.Tensor:
        """Read weights while nothing is written, without the lock.

        The lock would make a thread wait for itself that holds it and decodes a vector in other threads.
        """
        while True:
            before = self._writes
            found = weights(self.written)
            if before % 2 == 0 and before == self._writes:
                return found
            time.sleep(0.001)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock, make threads that read wait, and delay signals until weights and handles agree again."""
        with self.lock:
            self._writes += 1
            try:
                with deferred_signals():
                    yield
            finally:
                self._writes += 1

    def write(self, undone: Sequence[Edit], done: Sequence[Edit]) -> None:
        """Undo edits and write others, within `writing`.

        Raises:
            BaseMismatchError, AlreadyAppliedError, TrainingError: As in `edits.write`.
        """
        discard_copies(self.model)
        known = dict(self.model.named_parameters(remove_duplicate=False))

        def forward() -> None:
            write(edited_parameters(self.model, known, (*undone, *done)), undone, done)

        def back() -> None:
            write(edited_parameters(self.model, known, (*undone, *done)), done, undone)

        self.together(forward, back, known.values())

    def together(
        self,
        action: Callable[[], None],
        back: Callable[[], None] = lambda: None,
        parameters: Iterable[torch.Tensor] | None = None,
    ) -> None:
        """Do something that only some of the processes that share the model may be able to do: all do it, or none.

        Args:
            action: What to do. It raises an error if it cannot be done.
            back: Reverses it.
            parameters: The parameters of the model, if they are known.

        Raises:
            TrainingError: Another process could not do it.
        """
        error: Exception | None = None
        try:
            action()
        except TaskvecError as found:
            error = found
        try:
            agree(error, meshes_of(self.model.parameters() if parameters is None else parameters))
        except TrainingError:
            if error is None:
                back()
            raise

    def keep(self, decoded: Decoded | None = None) -> None:
        """Keep a decoded vector, and forget the least recently used ones beyond the limit."""
        with self._cache_lock:
            if decoded is not None:
                self.cache[decoded.digest] = decoded
                self.cache.move_to_end(decoded.digest)
            needed = {
                each.digest for each in (decoded, *(handle.decoded for handle in self.handles)) if each is not None
            }
            size = sum(each.size for each in self.cache.values())
            for digest in [digest for digest in self.cache if digest not in needed]:
                if size <= self.limit:
                    break
                size -= self.cache.pop(digest).size

    def decode(self, vector: TaskVector, base: Checkpoint | None, progress: Progress) -> Decoded:
        """Decode a vector for the weights without what is attached, or take it from the cache.

        The lock is not waited for, so the model can compute in the meantime.
        """
        with self._cache_lock:
            if (decoded := self.cache.get(vector.digest)) is not None:
                return decoded  # compared with the weights when it is written
        discard_copies(self.model)
        return decode(self.model, vector, self, base, progress, self._digests if self.is_private else None)

    def forget(self) -> None:
        """Forget all vectors and digests, because the weights have changed for good."""
        with self._cache_lock:
            self.cache.clear()
        self._digests.clear()


_STATES: WeakKeyDictionary[nn.Module, LiveState] = WeakKeyDictionary()
_STATES_LOCK = RLock()


def state_of(model: nn.Module) -> LiveState:
    """Return the state of a model without wrappers; the same one each time."""
    with _STATES_LOCK:
        if model not in _STATES:
            _STATES[model] = LiveState(model)
        return _STATES[model]


def check_alone(model: nn.Module) -> None:
    """Check that nothing is attached to a model of which this one is a part, or to a part of it.

    Args:
        model: The model, without wrappers.

    Raises:
        UsageError: Something is attached there, under other names and with another lock.
    """
    with _STATES_LOCK:
        others = [(other, state) for other, state in _STATES.items() if other is not model]
    for other, state in others:
        names = [handle.name for handle in state.handles if handle.edits]
        if names and (any(part is model for part in other.modules()) or any(part is other for part in model.modules())):
            raise UsageError(
                f"{names[0]} is attached to a {type(other).__name__} that shares weights with this "
                f"{type(model).__name__}: attach all vectors to the same module"
            )
