"""Named vectors for one model, for servers: one is attached at a time, others are kept decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from os import PathLike
from threading import Lock

from torch import nn

from taskvec_formats import Checkpoint

from ..arguments import instance, one_of, path_of, said
from ..errors import UsageError
from ..hub import open_checkpoint
from ..reporting.progress import silent
from ..vectors.vector import TaskVector
from .attach import attach
from .live_state import CACHE, state_of
from .wrappers import unwrapped

StrPath = str | PathLike[str]


class TaskSwitcher:
    """Switches a model between named vectors.

    Decoded vectors are kept on the model's device, the most recently used ones within `cache_bytes`, so that switching
    to one of them only writes the weights that differ. All methods may be called from several threads.

    Example:
        ```python
        switcher = TaskSwitcher(model, {"sql": "sql.lota", "maths": "maths.lota"})
        with switcher.use("sql") as model:
            model.generate(...)
        ```

    Args:
        model: The model, loaded from the base of the vectors.
        tasks: Task name -> vector or the path of a `.lota` file.
        base: The base on disk, or its path. It is needed if the model has a narrower dtype than its checkpoint.
        cache_bytes: The largest size of the decoded vectors that are kept, in bytes. The attached vector is kept even
            if it is larger.

    Raises:
        UsageError: A path does not exist, an argument is invalid, or a vector is attached to the model.
        FormatError: A file cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Mapping[str, TaskVector | StrPath] | None = None,
        *,
        base: Checkpoint | StrPath | None = None,
        cache_bytes: int = CACHE,
    ) -> None:
        instance("tasks", {} if tasks is None else tasks, Mapping)
        self._tasks: dict[str, TaskVector] = {}
        self._lock = Lock()
        for name, vector in (tasks or {}).items():
            self.add(name, vector)
        self._base = None if base is None else open_checkpoint(base)
        self._handle = attach(model, None, base=self._base, cache_bytes=cache_bytes)
        self._model = unwrapped(model)  # a handle alone would not keep it
        self._state = state_of(self._model)
        others = [handle.name for handle in self._state.handles if handle.edits]
        if others:
            self._handle.detach()
            raise UsageError(f"{others[0]} is attached to the model: detach it, so that tasks start from the base")
        self._loading: dict[str, Future[None]] = {}
        self._pool = ThreadPoolExecutor(1, "taskvec-prefetch")
        self._task: str | None = None
        self._is_used = self._is_closed = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks, in the order in which they were added."""
        with self._lock:
            return tuple(self._tasks)

    @property
    def task(self) -> str | None:
        """The task whose vector is attached; None if the model has the weights of the base."""
        return self._task

    @property
    def digest(self) -> str | None:
        """The digest of the attached vector; None if there is none."""
        return self._handle.digest

    def add(self, name: str, vector: TaskVector | StrPath) -> None:
        """Add a task, or replace the vector of one. The model changes when the task is used next.

        Args:
            name: The name of the task.
            vector: The vector or the path of a `.lota` file.

        Raises:
            UsageError: The path does not exist, or an argument has the wrong type.
            FormatError: The file cannot be read.
        """
        if not isinstance(name, str):
            raise UsageError(f"the name of a task must be a str, found {said(name)}")
        opened = vector if isinstance(vector, TaskVector) else TaskVector.open(path_of(f"task {name!r}", vector))
        with self._lock:
            self._tasks[name] = opened

    def remove(self, name: str) -> None:
        """Remove a task. If its vector is attached, it stays attached until another task is used.

        Raises:
            UsageError: There is no such task.
        """
        self._vector(name)
        with self._lock:
            del self._tasks[name]

    def prefetch(self, name: str) -> Future[None]:
        """Decode the vector of a task in the background, while the model may compute.

        Args:
            name: The name of the task.

        Returns:
            A future that is done when the vector is decoded. It has the exception if the vector does not fit.

        Raises:
            UsageError: There is no such task, or the switcher is closed.
        """
        vector = self._vector(name)
        with self._lock:
            self._check_open()
            running = self._loading.get(name)
            if running is None or running.done():
                running = self._loading[name] = self._pool.submit(self._prepare, vector)
            return running

    @contextmanager
    def use(self, name: str | None) -> Iterator[nn.Module]:
        """Hold the lock of the model, with the vector of a task attached.

        The vector is decoded before the lock is taken, so other threads use the model in the meantime.

        Args:
            name: The name of the task. None for the weights of the base.

        Yields:
            The model.

        Raises:
            UsageError: There is no such task, the switcher is closed, or this thread uses a task already.
            BaseMismatchError, TrainingError, FormatError: As in `attach`. The model then keeps what was attached.
        """
        self._check_open()
        vector = None if name is None else self._vector(name)
        if name is not None:
            self.prefetch(name).result()
        with self._handle.lock:
            if self._is_used:  # by this thread, as others wait for the lock
                raise UsageError(f"task {self._task!r} is in use in this thread: leave its block first")
            self._check_open()  # it may have been closed in the meantime
            if self._handle.digest != (None if vector is None else vector.digest):
                self._handle.swap(vector)
            self._task, self._is_used = name, True
            try:
                yield self._model
            finally:
                self._is_used = False

    def on_change(self, hook: Callable[[str | None], None]) -> None:
        """Call a function whenever the weights have changed, as `Attachment.on_change` does."""
        self._handle.on_change(hook)

    def close(self) -> None:
        """Restore the weights of the base, and end the thread that decodes in the background.

        Raises:
            UsageError: This thread uses a task.
        """
        with self._handle.lock:
            if self._is_used:  # by this thread, as others wait for the lock
                raise UsageError(f"task {self._task!r} is in use in this thread: leave its block first")
            self._is_closed = True
            self._handle.detach()
            self._task = None
        self._pool.shutdown()

    def _check_open(self) -> None:
        if self._is_closed:
            raise UsageError("the switcher is closed")

    def _vector(self, name: str) -> TaskVector:
        with self._lock:
            if not self._tasks:
                raise UsageError(f"there is no task {name!r}: the switcher has no tasks")
            one_of("the task", name, tuple(self._tasks))
            return self._tasks[name]

    def _prepare(self, vector: TaskVector) -> None:
        self._state.keep(self._state.decode(vector, self._base, silent))

    def __enter__(self) -> TaskSwitcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<TaskSwitcher on {type(self._model).__name__}: {len(self.tasks)} tasks, {self.task!r} is attached>"
