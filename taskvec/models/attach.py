"""Vectors on a running model: attach, detach, swap, advance.

The elements that a vector changes are decoded once: their positions, the values before and the values after, as tensors
on the model's device. Attaching writes the values after, detaching the values before, so the weights are those of the
base again, to the bit. Whether a vector fits is checked against the weights of the model; the base on disk is needed
only for a model whose dtype is narrower than that of its checkpoint.

The weights of a model and what is attached to it are protected by one lock. A server that generates text in other
threads holds the lock of a handle while it generates:

    with handle.lock:
        model.generate(...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from taskvec_formats import Checkpoint

from ..arguments import instance, real, said, truth, whole
from ..errors import BaseMismatchError, TrainingError, UsageError
from ..merging.combine import merge
from ..reporting import bars
from ..reporting.progress import Progress
from ..vectors.vector import TaskVector
from .decoding import Decoded
from .edits import Edit, plain
from .live_state import Handle, LiveState, check_alone, state_of
from .loading import load_weights
from .wrappers import unwrapped

StrPath = str | PathLike[str]
Vectors = TaskVector | StrPath | Sequence[TaskVector | StrPath]
_MERGE = ("method", "weights", "density", "lam")  # arguments of merge that `load` tells from those of from_pretrained


class Attachment:
    """A vector on a model. Made by `attach`; in a `with` statement it is detached at the end of the block.

    Attributes:
        lock: The lock of the model: hold it while the model computes in another thread.
        decoded: The attached vector, decoded; None if there is none.
    """

    def __init__(self, state: LiveState, base: Checkpoint | None) -> None:
        self.lock = state.lock
        self.decoded: Decoded | None = None
        self._state = state
        self._kind = type(state.model).__name__
        self._base = base
        self._blocks: list[list[bool]] = []  # of `enabled`; the last one decides
        self._hooks: list[Callable[[str | None], None]] = []

    @property
    def model(self) -> nn.Module:
        """The model, without wrappers.

        Raises:
            UsageError: The model no longer exists.
        """
        return self._state.model

    @property
    def name(self) -> str | None:
        """The name of the attached vector; None if there is none."""
        return None if self.decoded is None else self.decoded.name

    @property
    def digest(self) -> str | None:
        """The digest of the vector in the weights, which identifies them together with the base.

        None if no vector is attached, or if the handle is disabled.
        """
        return None if self.decoded is None or not self._is_enabled else self.decoded.digest

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits of the attached vector."""
        return () if self.decoded is None else self.decoded.edits

    @property
    def written(self) -> tuple[Edit, ...]:
        """The edits that are in the weights now: none while the handle is disabled."""
        return self.edits if self._is_enabled else ()

    @property
    def _is_enabled(self) -> bool:
        return self._blocks[-1][0] if self._blocks else True

    @property
    def entries(self) -> int:
        """The number of elements that the attached vector changes."""
        return sum(len(edit.indices) for edit in self.edits)

    @property
    def bytes_kept(self) -> int:
        """The size of the positions and values that are kept of the attached vector."""
        return 0 if self.decoded is None else self.decoded.nbytes

    def on_change(self, hook: Callable[[str | None], None]) -> None:
        """Call a function whenever this handle has changed the weights, inside the lock.

        Servers use this to drop caches that depend on the weights, such as a prefix cache. If a hook raises an error,
        the others are still called, and the weights remain changed.

        Args:
            hook: Takes the new `digest`; after `advance`, the digest of the patch.
        """
        self._hooks.append(hook)

    def detach(self) -> None:
        """Restore the weights of the base. Nothing happens if no vector is attached.

        Raises:
            BaseMismatchError, TrainingError: The weights were changed in the meantime. The vector stays attached.
        """
        with self.lock:
            was = self.digest
            self._put(None)
            if self in self._state.handles:
                self._state.handles.remove(self)
            self._state.keep()
            if was is not None:
                self._changed()

    def forget(self) -> None:
        """Give up the attached vector, and leave the weights as they are.

        This is the way out if the weights were changed by someone else, as by training or `load_state_dict`.
        """
        with self.lock, self._state.writing():
            self.decoded = None
            if self in self._state.handles:
                self._state.handles.remove(self)
            self._state.forget()

    def swap(
        self, vector: Vectors | None, scale: float = 1.0, *, progress: bool | Progress = False, **merge: Any
    ) -> None:
        """Attach another vector instead. The vector is decoded and checked before the weights change.

        Within a block of `enabled(False)`, the vector is written at the end of the block.

        Args:
            vector: As in `attach`; None attaches nothing.
            scale: A factor of the deltas.
            progress: As in `attach`.
            **merge: As in `attach`.

        Raises:
            BaseMismatchError, AlreadyAppliedError, TrainingError, UsageError, FormatError: As in `attach`. The model
                then keeps what was attached.
        """
        with bars.shown(progress) as report:
            wanted = _resolved(vector, scale, merge, report)
            decoded = None if wanted is None else self._state.decode(wanted, self._base, report)
            with self.lock:
                was = self.digest
                self._put(decoded)
                if self.digest != was:
                    self._changed()

    def advance(self, patch: TaskVector | StrPath, *, progress: bool | Progress = False) -> None:
        """Apply a vector or patch to the weights for good. Nothing is kept for restoration.

        This is how a model follows a sequence of versions, each stored as a patch from the one before.

        Args:
            patch: The vector or patch from the current weights to the next ones, or the path of a `.lota` file.
            progress: As in `attach`.

        Raises:
            UsageError: A vector is attached to the model, here or by another handle, or there is no patch.
            BaseMismatchError, AlreadyAppliedError, TrainingError, FormatError: As in `attach`.
        """
        wanted = _opened(patch)
        with self.lock, bars.shown(progress) as report:
            attached = [handle.name for handle in self._state.handles if handle.name is not None]
            if attached:
                raise UsageError(f"{attached[0]} is attached to the model: detach it before the weights are advanced")
            decoded = self._state.decode(wanted, self._base, report)
            with self._state.writing():
                self._state.write((), decoded.edits)
                self._state.forget()
            self._changed(decoded.digest)

    @contextmanager
    def enabled(self, on: bool) -> Iterator[None]:
        """Within the block, take the vector off the model or put it back on, without forgetting it.

        If several blocks overlap, as of several threads, the one that was begun last decides. If the vector cannot be
        put back at the end because the weights were changed within the block, the handle gives it up.

        Args:
            on: Whether the vector is on the model within the block.
        """
        block = [truth("`on`", on)]
        try:
            with self.lock:
                self._set_blocks([*self._blocks, block])
            yield
        finally:
            with self.lock:
                self._leave(block)

    def _leave(self, block: list[bool]) -> None:
        rest = [each for each in self._blocks if each is not block]
        was_on = self._is_enabled
        try:
            self._set_blocks(rest)
        except (BaseMismatchError, TrainingError):
            if was_on:  # it cannot be taken off, so it is on
                self._blocks = []
            else:  # it cannot be put back on, so it is gone
                self.forget()
                self._blocks = rest
            raise

    def _set_blocks(self, blocks: list[list[bool]]) -> None:
        on = blocks[-1][0] if blocks else True
        if on == self._is_enabled or not self.edits:
            self._blocks = blocks
            return
        with self._state.writing():
            self._state.write(*((), self.edits) if on else (self.edits, ()))
            self._blocks = blocks
        self._changed()

    def _put(self, decoded: Decoded | None) -> None:
        """Write another decoded vector, or none, in place of the attached one."""
        others = [handle for handle in self._state.handles if handle is not self and handle.edits]
        if decoded is not None and others:
            self._state.together(lambda: _check_disjoint(decoded, others))
        with self._state.writing():
            self._state.write(self.written, decoded.edits if decoded is not None and self._is_enabled else ())
            self.decoded = decoded
            if decoded is not None and self not in self._state.handles:
                self._state.handles.append(self)
        if decoded is not None:
            self._state.keep(decoded)

    def _changed(self, patch: str | None = None) -> None:
        """Call the hooks with the digest of a patch, or with the current digest, which a hook may change."""

        def call(hook: Callable[[str | None], None]) -> None:
            hook(self.digest if patch is None else patch)

        with ExitStack() as stack:  # which calls all of them, and raises the error of the last that failed
            for hook in reversed(self._hooks):
                stack.callback(call, hook)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        if self.decoded is None:
            return f"<Attachment on {self._kind}: nothing is attached>"
        off = "" if self._is_enabled else ", disabled"
        return (
            f"<Attachment on {self._kind}: {self.name!r} ({self.decoded.digest}), {self.entries:,} entries, "
            f"{self.bytes_kept:,} bytes kept{off}>"
        )


def attach(
    model: nn.Module,
    vector: Vectors | None,
    scale: float = 1.0,
    *,
    base: Checkpoint | None = None,
    cache_bytes: int | None = None,
    progress: bool | Progress = False,
    **merge: Any,
) -> Attachment:
    """Attach a vector to a model in memory.

    Args:
        model: The model, loaded from the vector's base. Wrappers by DistributedDataParallel, torch.compile and peft are
            looked through. If it is sharded by fully_shard, all processes must do the same with it, in the same order.
        vector: A vector or the path of a `.lota` file; a list of them, which are merged; None attaches nothing yet.
        scale: A factor of the deltas.
        base: The base on disk. It is needed if the model has a narrower dtype than its checkpoint.
        cache_bytes: The largest size of the decoded vectors that the model keeps for later, in bytes, for this handle
            and all others. Attached vectors are kept beyond it. None keeps what is set: 1 GiB at first.
        progress: True shows progress bars. A callable receives (stage, done, total, note) at every step.
        **merge: How a list is merged: the arguments of `taskvec.merge`, such as `method` and `weights`.

    Returns:
        The handle.

    Raises:
        BaseMismatchError: The weights of the model are not those of the vector's base.
        AlreadyAppliedError: They have the tuned values already.
        TrainingError: The model is quantised or sharded other than by rows, lacks a parameter, or the vector adds,
            removes or resizes tensors; or another process that shares the model cannot attach the vector.
        UsageError: The vector shares positions with one that is attached, a vector is attached to a module around the
            model or within it, or an argument is invalid.
        MergeError, KindError, FormatError: As in `taskvec.merge`.
    """
    instance("model", model, nn.Module)
    if cache_bytes is not None and whole("`cache_bytes`", cache_bytes) < 0:
        raise UsageError(f"`cache_bytes` must be at least 0, found {cache_bytes}")
    state = state_of(unwrapped(model))
    check_alone(state.model)
    handle = Attachment(state, base)
    with bars.shown(progress) as report:
        wanted = _resolved(vector, scale, merge, report)
        decoded = None if wanted is None else state.decode(wanted, base, report)
        with state.lock:
            handle._put(decoded)
            if decoded is None:
                state.handles.append(handle)  # so that it is listed
            if cache_bytes is not None:
                state.limit = cache_bytes
                state.keep()
    return handle


def load(
    base: Checkpoint, vectors: Vectors | None, options: Mapping[str, Any], progress: bool | Progress = False
) -> PreTrainedModel:
    """Load the language model of a checkpoint, and attach vectors to it.

    Args:
        base: The checkpoint of a model folder.
        vectors: As in `attach`.
        options: Arguments of `from_pretrained`, `scale`, and arguments of `taskvec.merge`.
        progress: As in `attach`.

    Raises:
        UsageError, TrainingError: As in `load_weights` and `attach`.
    """
    of_merge = {name: options[name] for name in _MERGE if name in options}
    others = {name: value for name, value in options.items() if name not in (*_MERGE, "scale")}
    model = load_weights(base.path, others)
    handle = attach(model, vectors, options.get("scale", 1.0), base=base, progress=progress, **of_merge)
    if vectors is None:
        handle.detach()
    return model


def attached(model: nn.Module) -> list[Attachment]:
    """Return the handles on a model, in the order in which they were made.

    Raises:
        UsageError: It is not a module.
        TrainingError: It is quantised.
    """
    instance("model", model, nn.Module)
    return [handle for handle in state_of(unwrapped(model)).handles if isinstance(handle, Attachment)]


def _resolved(vector: Vectors | None, scale: float, options: dict[str, Any], progress: Progress) -> TaskVector | None:
    """Return the one vector that the arguments of `attach` describe."""
    factor = real("scale", scale)
    if vector is not None and isinstance(vector, Sequence) and not isinstance(vector, (str, bytes)):
        found = merge([_opened(each) for each in vector], progress=progress, **options)
    else:
        if options:
            raise UsageError(f"`{min(options)}` has no effect here: only a list of vectors is merged")
        if vector is None:
            return None
        found = _opened(vector)
    return found if factor == 1 else factor * found


def _opened(vector: object) -> TaskVector:
    if isinstance(vector, TaskVector):
        return vector
    if not isinstance(vector, (str, PathLike)):
        raise UsageError(
            f"vector must be a TaskVector, the path of a .lota file or a list of them, found {said(vector)}"
        )
    return TaskVector.open(vector)


def _check_disjoint(decoded: Decoded, handles: Iterable[Handle]) -> None:
    """Raise UsageError if a vector changes positions that an attached one changes."""
    for handle in handles:
        theirs = {plain(edit.parameter): edit for edit in handle.edits}
        for edit in decoded.edits:
            other = theirs.get(plain(edit.parameter))
            if other is not None and (count := edit.meets(other)):
                raise UsageError(
                    f"{decoded.name} and {handle.name}, which is attached, both change {count:,} elements of parameter "
                    f"{edit.parameter!r}: merge them and attach the result, or detach {handle.name}"
                )
