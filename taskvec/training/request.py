"""Request for a training run: base, data, options and earlier vectors, checked and completed before the run starts."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec_formats import Checkpoint
from taskvec_formats.system.parallel import ordered_map

from ..applying.overlay import Patched
from ..arguments import said
from ..data.corpus import Corpus, read_corpus
from ..data.examples import check_examples
from ..destination import check_apart
from ..devices import device_of
from ..errors import BaseMismatchError, TrainingError, UsageError
from ..names import layer_and_module
from ..reporting.progress import Progress, silent
from ..reporting.throughput import Throughput, bytes_of
from ..resume import first_difference
from ..vectors.lineage import shortened
from ..vectors.source import inputs_of
from ..vectors.vector import TaskVector
from ..version import __version__
from .effects import check_effects
from .options import TrainingOptions
from .rates import with_defaults
from .targets import chosen

if TYPE_CHECKING:
    from .processes import Processes
    from .run import Run


@dataclass(frozen=True)
class Request:
    """Inputs of a training run.

    Attributes:
        base: The checkpoint of a model folder.
        data: A file, a folder of files or a Hub id (`data.sources`).
        options: How to train.
        mask_from: Take the mask from this vector, without calibration: all its positions if options.sparsity is None,
            else the k of largest magnitude.
        disjoint_from: Vectors of earlier tasks, whose positions stay out of the mask (LoTTO). They do not change k.
        start_from: Start at base + this vector. options.relative_to says what the result is relative to.
        mix: Further data, and the share of the examples to draw from each.
        eval_data: Data to evaluate on.
    """

    base: Checkpoint
    data: Path
    options: TrainingOptions
    mask_from: TaskVector | None = None
    disjoint_from: Sequence[TaskVector] = ()
    start_from: TaskVector | None = None
    mix: Sequence[tuple[Path, float]] = ()
    eval_data: Path | None = None

    @property
    def calibrates(self) -> bool:
        """Whether the run has a calibration phase that chooses the mask."""
        return self.options.method == "lota" and self.mask_from is None and self.options.criterion.calibrates

    @property
    def evaluates(self) -> bool:
        """Whether there are examples to evaluate on."""
        return self.eval_data is not None or bool(self.options.eval_split)

    @property
    def sources(self) -> list[Path]:
        """Paths and Hub ids of all data that the run reads, as given."""
        return [self.data, *([] if self.eval_data is None else [self.eval_data]), *(path for path, _ in self.mix)]

    @property
    def vectors(self) -> list[TaskVector]:
        """All vectors that the run reads."""
        found = (self.mask_from, self.start_from, *self.disjoint_from)
        return [vector for vector in found if vector is not None]

    def check(self, folder: Path | None = None) -> None:
        """Check everything that can be checked before data is read.

        Args:
            folder: The folder that the run stores its state in.

        Raises:
            UsageError: Options and arguments contradict each other or have no effect, or `folder` contains an input.
            BaseMismatchError: `start_from` adds, removes or resizes tensors.
        """
        options = self.options
        options.check(takes_mask=self.mask_from is not None)
        if options.method != "lota" and (self.mask_from is not None or self.disjoint_from):
            raise UsageError(f"`method={options.method}` has no mask: it takes no `mask_from` and no `disjoint_from`")
        if options.method == "lota" and self.mask_from is None and options.sparsity is None:
            raise UsageError("`sparsity` is required unless `mask_from` is given")
        if self.start_from is not None:
            _check_forms(self.start_from)
        if self.eval_data is not None and options.eval_split:
            raise UsageError("`eval_data` and `eval_split` cannot be used together")
        if self.eval_data is not None and options.steps == 0:
            raise UsageError("`eval_data` has no effect here: `steps=0` does not train")
        if self.mix and options.steps == 0 and not self.calibrates:
            raise UsageError("`mix` has no effect here: nothing is calibrated, and `steps=0` does not train")
        check_effects(
            options,
            takes_mask=self.mask_from is not None,
            evaluates=self.evaluates,
            starts_from=self.start_from is not None,
        )
        # reports a mistyped pattern before a model is loaded
        chosen(self.base.tensors, options.include, options.exclude, self._likely())
        if folder is not None:
            files = [file for source in self.sources for file in check_examples(source)]
            check_apart(folder, [*files, *inputs_of(self.base, *self.vectors)])

    def _likely(self) -> list[str]:
        """Tensors that would be trained, as far as that is known without the model: the matrices of the blocks."""
        if self.options.method == "fft":
            return list(self.base.tensors)
        return [
            name
            for name, info in self.base.tensors.items()
            if len(info.shape) > 1 and layer_and_module(name)[0] is not None
        ]

    def with_defaults(self) -> Request:
        """The same request with the default learning rates of its phases (`rates.with_defaults`)."""
        return replace(self, options=with_defaults(self.options, calibrates=self.calibrates))

    def prepare(self) -> Corpus:
        """Read the data, and check everything that can be checked before the model is loaded.

        Importing torch and transformers' models takes seconds and memory, so the checks that need neither come first.

        Returns:
            The training and evaluation examples.

        Raises:
            DataError: A row of the data cannot be understood.
            UsageError: A device, a file, or a package that reads it or logs to `report_to` is missing.
            TrainingError: The base is not a model that can be trained.
        """
        options = self.options
        corpus = read_corpus(
            self.data, mix=self.mix, eval_data=self.eval_data, eval_split=options.eval_split, seed=options.seed
        )
        options.check_warmup(len(corpus.train), calibrates=self.calibrates)
        options.check_regrowth(len(corpus.train))
        from ..models.loading import load_tokenizer

        device_of(options.device)
        load_tokenizer(self.base.path, trust_remote_code=options.trust_remote_code)
        from .loop import check_report_to

        check_report_to(options.report_to)
        return corpus

    def check_processes(self, processes: Processes, folder: Path | None) -> None:
        """Check that the run fits the number of its processes.

        Args:
            processes: The processes of the run.
            folder: The folder that the run stores its state in.

        Raises:
            UsageError: It does not.
        """
        options, count = self.options, processes.count
        if count == 1:
            if options.shards is not None:
                raise UsageError("`shards` has no effect in one process: start several, for example with torchrun")
            return
        if folder is None:
            raise UsageError(f"{count} processes need `folder`, a folder that all of them can read and write")
        if options.method == "lora":
            raise UsageError("`method=lora` trains in one process; lota and fft train in several")
        if options.regrow_steps is not None and processes.shards > 1:
            raise UsageError(
                "`regrow_steps` compares all gradients of a tensor, but the processes divide its rows: use `shards=1`"
            )
        if options.batch_size < count:
            raise UsageError(
                f"`batch_size` counts the examples of all {count} processes, so it must be at least {count}, "
                f"found {options.batch_size}"
            )

    def open(self, corpus: Corpus, progress: Progress, processes: Processes | None = None, *, dense: bool) -> Run:
        """Load the model at its start.

        Args:
            corpus: What `prepare` returned.
            progress: Called with the stage, the steps done, the steps in all, and a note.
            processes: The processes of the run; None is this process alone.
            dense: Whether all weights train, and are therefore stored in f32 whatever options.dtype is.
        """
        from .processes import Processes
        from .run import Run

        processes = processes or Processes()
        start = self.base if self.start_from is None else Patched(self.base, self.start_from)
        changed = [] if self.start_from is None else list(self.start_from.specs)
        if start is not self.base:
            hash_together(start, processes, progress)
        with processes.agreeing():
            run = Run(start, changed, corpus, self.options, progress, processes, dense=dense)
        self.options.check_warmup(len(run.rows), calibrates=self.calibrates, packed=True)
        self.options.check_regrowth(len(run.rows), packed=True)
        return run

    def agreed_record(self, corpus: Corpus, processes: Processes, progress: Progress = silent) -> dict[str, Any]:
        """As `record`, and check that all processes have read the same.

        Args:
            corpus: What `prepare` returned.
            processes: The processes of the run.
            progress: Called while the base is hashed.

        Raises:
            TrainingError: Processes have different inputs. The message names the first difference.
        """
        hash_together(self.base, processes, progress)
        record = self.record(corpus)
        expected, *others = processes.gather(record)
        with processes.agreeing():
            for rank, found in enumerate(others, 1):
                if difference := first_difference(found, expected):
                    name, there, here = difference
                    raise TrainingError(
                        f"process {rank} of {processes.count} has other input than process 0: {name} is "
                        f"{said(there, 100)} there, {said(here, 100)} in process 0"
                    )
        return record

    def record(self, corpus: Corpus) -> dict[str, Any]:
        """Identity of this run as JSON: compared before a run is resumed, and stored in the `.lota` file.

        Args:
            corpus: What `prepare` returned.
        """
        options = {
            name: value for name, value in asdict(self.options).items() if name not in {"device", "report_to", "shards"}
        }
        return {
            "base": self.base.fingerprint,
            "data": corpus.files,
            "mix": [share for _, share in self.mix],
            "options": options,
            "mask_from": _identity(self.mask_from),
            "disjoint_from": [_identity(vector) for vector in self.disjoint_from],
            "start_from": _identity(self.start_from),
            "versions": _versions(),
        }


def hash_together(checkpoint: Checkpoint, processes: Processes, progress: Progress) -> None:
    """Hash a checkpoint. Processes that read the same files share the work.

    Args:
        checkpoint: The checkpoint. Its digests are known afterwards.
        processes: The processes of the run.
        progress: Called while tensors are hashed.
    """
    if processes.count == 1:
        return
    with processes.agreeing():
        stats = [os.stat(path) for path in checkpoint.inputs]
        seen = (platform.node(), tuple((stat.st_dev, stat.st_ino, stat.st_mtime_ns) for stat in stats))
    same = [rank for rank, found in enumerate(processes.gather(seen)) if found == seen]
    names = list(checkpoint.tensors)[same.index(processes.rank) :: len(same)]
    with processes.agreeing():
        own, rate = {}, Throughput()
        for name, digest in zip(names, ordered_map(checkpoint.digest, names), strict=True):
            own[name] = digest
            progress("hashing base", len(own), len(names), rate.after(bytes_of(checkpoint, name)))
    found = processes.gather(own)
    checkpoint.remember({name: digest for rank in same for name, digest in found[rank].items()})


def _check_forms(start: TaskVector) -> None:
    """Raise BaseMismatchError if the vector adds, removes or resizes tensors: the base's model has no room for them."""
    reformed = [name for name, spec in start.specs.items() if spec.origin != spec.form]
    for name in (*reformed, *start.header.removed):
        raise BaseMismatchError(f"{start.name} changes the form of tensor {name!r}: apply it and train from the result")


def _identity(vector: TaskVector | None) -> dict[str, str] | None:
    return None if vector is None else {"name": shortened(vector.name), "digest": vector.digest}


def _versions() -> dict[str, str]:
    import numpy
    import torch
    import transformers

    packages = {"torch": torch, "transformers": transformers, "numpy": numpy}
    return {"taskvec": __version__, **{name: str(package.__version__) for name, package in packages.items()}}
