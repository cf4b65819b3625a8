"""The processes of a training run, as torchrun and `accelerate launch` start them.

Values that processes exchange here are small, except the entries of a vector that is written. They go through the
memory of the CPU (gloo), also if the model is on accelerators.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from taskvec_formats.system.memory import return_freed_memory

from ..devices import device_of
from ..errors import ProcessError, TaskvecError, TrainingError, UsageError
from ..launcher import launched
from .options import TrainingOptions

Value = TypeVar("Value")
Counts = npt.NDArray[np.int64]
_MINUTES = 30  # after which a process that does not answer is given up


class Processes:
    """The processes of a run, of which this is one.

    Functions that exchange something must be called by all processes, in the same order.

    Attributes:
        rank: Number of this process.
        count: Number of processes.
        shards: Number of processes among which the weights of the model are divided. There are count / shards replicas.
        shard: Number of this process among them.
        mesh: The processes as torch's engine sees them; None for a process by itself.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank = rank
        self.count = count
        self.shards, self.shard = 1, 0
        self.mesh: DeviceMesh | None = None
        self._store = store
        self._all: ProcessGroup | None = None
        self._sharing: ProcessGroup | None = None
        self._arranged: tuple[int, str] | None = None  # the last arguments of `divide`

    def divide(self, shards: int | None, device: str) -> None:
        """Arrange the processes for a model whose weights they divide.

        Args:
            shards: Number of processes among which the weights are divided; None divides them among all.
            device: Type of the device of the model.

        Raises:
            UsageError: The number of processes is not a multiple of `shards`.
        """
        if (shards or self.count, device) == self._arranged:
            return
        if self.count % (shards or self.count):
            raise UsageError(
                f"`shards` divides the weights among groups of {shards} processes, but there are {self.count}"
            )
        self.shards = shards or self.count
        self._arranged = self.shards, device
        replicas = self.count // self.shards
        self.shard = self.rank % self.shards
        if replicas == 1:
            self.mesh = init_device_mesh(device, (self.shards,), mesh_dim_names=("shard",))
        else:
            self.mesh = init_device_mesh(device, (replicas, self.shards), mesh_dim_names=("replicate", "shard"))
        self._all = _group(range(self.count))
        for first in range(0, self.count, self.shards):  # every process takes part in making every group
            ranks = range(first, first + self.shards)
            group = _group(ranks)
            if self.rank in ranks:
                self._sharing = group

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    @property
    def in_first_replica(self) -> bool:
        """Whether this process has a part of the first replica of the model."""
        return self.rank < self.shards

    def gather(self, value: Value) -> list[Value]:
        """Return what each process gives, in their order. The values are pickled."""
        return _gathered(value, self._all, self.count)

    def gather_parts(self, value: Value) -> list[Value]:
        """Return what each process that has a part of this replica of the model gives, in the order of the parts."""
        return _gathered(value, self._sharing, self.shards)

    def first(self, value: Callable[[], Value]) -> Value:
        """Return what the function returns in the first process. It is not called in others.

        Raises:
            Exception: What it raises. Other processes raise an error of the same kind and message.
        """
        found: list[Any] = [None]
        with self.agreeing():
            found = [value() if self.is_first else None]
        if self.count > 1:
            distributed.broadcast_object_list(found, 0, group=self._all)
        return found[0]  # type: ignore[no-any-return]

    def total(self, counts: Counts) -> Counts:
        """Return the sums of the counts of all parts of the model."""
        if self.shards == 1:
            return counts
        sums = torch.from_numpy(counts.copy())
        distributed.all_reduce(sums, group=self._sharing)
        found: Counts = sums.numpy()
        return found

    def add(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the sums of numbers over all parts of the model."""
        if self.mesh is None or self.shards == 1:
            return numbers
        total = numbers.clone()
        distributed.all_reduce(total, group=self.mesh.get_group("shard"))
        return total

    def highest(self, number: int) -> int:
        """Return the highest number that a process gives."""
        if self.count == 1:
            return number
        found = torch.tensor(number)
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self._all)
        return int(found)

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            distributed.barrier(self._all)

    def swap(self, outgoing: Sequence[bytes]) -> list[bytes]:
        """Send a message to each process that has a part of this replica, and return what each sent to this one.

        Args:
            outgoing: The messages, in the order of the parts.
        """
        if self.shards == 1:
            return list(outgoing)
        sizes = torch.tensor([len(message) for message in outgoing])
        arriving = torch.empty_like(sizes)
        distributed.all_to_all_single(arriving, sizes, group=self._sharing)
        sent = torch.frombuffer(bytearray(b"".join(outgoing)) or bytearray(1), dtype=torch.uint8)[: int(sizes.sum())]
        received = torch.empty(int(arriving.sum()), dtype=torch.uint8)
        lengths = [int(size) for size in arriving]
        distributed.all_to_all_single(received, sent, lengths, sizes.tolist(), group=self._sharing)
        return [part.numpy().tobytes() for part in received.split(lengths)]

    def to_first(self, value: Value) -> list[Value]:
        """Return what each part gives, in their order, in the first process; an empty list in others."""
        if self.shards == 1:
            return [value]
        found: list[Any] | None = [None] * self.shards if self.shard == 0 else None
        distributed.gather_object(value, found, group=self._sharing, group_dst=0)
        return found or []

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Raise an error of one process in all of them, so that none waits for it.

        Raises:
            TaskvecError: A process has failed. The message names it, unless it is the first or all have failed with the
                same message.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as failure:
            error = failure
        if self.count == 1:
            if error is not None:
                raise error
            return
        try:
            said = self.gather(None if error is None else (str(error), _kind(error)))
        except RuntimeError:
            if error is not None:  # says more than that another process has ended
                raise error from None
            raise
        failed = [(rank, each) for rank, each in enumerate(said) if each is not None]
        if not failed:
            return
        rank, (text, kind) = failed[0]
        same = len({each for _, each in failed}) == 1 and len(failed) == self.count
        is_own = error is not None and (same or (rank == 0 and self.is_first))
        raised = error if is_own else kind(text if same or not rank else f"process {rank} of {self.count}: {text}")
        assert raised is not None
        raised.is_shared = True  # type: ignore[attr-defined]  # the first process reports it
        raise raised from error

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Turn the failure of another process, which torch reports in various ways, into one sentence.

        Raises:
            ProcessError: Another process has ended, or does not answer.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _is_of_engine(error):
                raise
            late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            what = f"did not answer within {_MINUTES} minutes" if late else "has ended"
            raise ProcessError(f"another of the {self.count} processes {what}") from error

    def is_first_to_say(self) -> bool:
        """Whether no other process has reported a failure yet. The answer is yes once per run."""
        if self._store is None:
            return True
        try:
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            return bool(self._store.add(f"taskvec/said/{attempt}", 1) == 1)
        except RuntimeError:  # the process that stored it has ended
            return True


def _kind(error: Exception) -> type[TaskvecError]:
    """The class of an error in the processes that do not have it."""
    return UsageError if isinstance(error, UsageError) else TrainingError


def _is_of_engine(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, distributed.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
    )


def _group(ranks: Sequence[int]) -> ProcessGroup:
    return distributed.new_group(list(ranks), timeout=timedelta(minutes=_MINUTES), backend="gloo")  # type: ignore[no-any-return]


def _gathered(value: Value, group: ProcessGroup | None, count: int) -> list[Value]:
    if count == 1:
        return [value]
    found: list[Value] = [value] * count
    distributed.all_gather_object(found, value, group=group)
    return found


_joined: Processes | None = None


def joined() -> Processes | None:
    """The processes that this process has joined, if any."""
    return _joined


def join(options: TrainingOptions) -> Processes:
    """Join the processes that torchrun or `accelerate launch` has started, each with an accelerator of its own.

    Args:
        options: The options of the run.

    Returns:
        The processes; a process by itself if there is no launcher.

    Raises:
        UsageError: The launcher is set up for another engine, or `device` or `shards` does not fit.
        ProcessError: Other processes do not answer.
    """
    global _joined  # noqa: PLW0603 - a property of the process
    if launched() == 1:
        return Processes()
    if _joined is None:
        _check_launcher(options)
        device = _own_device(options.device)
        store = None
        if not distributed.is_initialized():
            backend = distributed.get_default_backend_for_device(device)
            try:
                store, rank, count = next(rendezvous("env://", timeout=timedelta(minutes=_MINUTES)))
                distributed.init_process_group(
                    backend if device == "cpu" else f"cpu:gloo,{device}:{backend}",
                    store=store,
                    rank=rank,
                    world_size=count,
                    timeout=timedelta(minutes=_MINUTES),
                )
            except (distributed.DistError, ValueError) as error:
                raise ProcessError(f"the other processes cannot be reached: {str(error).splitlines()[0]}") from None
        return_freed_memory()  # weights of blocks are gathered and freed all the time
        _joined = Processes(distributed.get_rank(), distributed.get_world_size(), store)
    _joined.divide(options.shards, device_of(options.device).type)
    return _joined


def _own_device(choice: str) -> str:
    """Type of the device that each process has one of; an accelerator becomes the current one."""
    device = device_of(choice).type
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if device != "cpu":
        if own >= torch.accelerator.device_count():
            raise UsageError(
                f"process {own} of this machine has no {device} device of its own: torch finds "
                f"{torch.accelerator.device_count()}; start as many processes, or use `device=cpu`"
            )
        torch.accelerator.set_device_index(own)
    return device


def _check_launcher(options: TrainingOptions) -> None:
    """Refuse settings of launchers that would have no effect, or another one than options."""
    for variable, engine in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "other kinds of parallelism"),
    ):
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise UsageError(
                f"accelerate is configured for {engine}, but training divides the weights by FSDP2: start the "
                "processes with torchrun, or configure accelerate for FSDP2"
            )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and os.environ.get("FSDP_VERSION") != "2":
        raise UsageError("accelerate is configured for FSDP 1: set its fsdp_version to 2")
    if ":" in options.device:
        raise UsageError(
            f"`device={options.device}` is one device, but there are {launched()} processes: leave its number out"
        )
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    wanted = {"float32": "no", "bfloat16": "bf16"}[options.dtype]
    if mixed not in ("no", wanted):
        raise UsageError(f"accelerate is configured for {mixed}, but `dtype={options.dtype}` is the arithmetic here")
    # Trainer would divide the model once more
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(variable, None)
