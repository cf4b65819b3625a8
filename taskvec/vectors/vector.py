"""The task vector: the difference of a fine-tuned model and its base, tensor by tensor, loaded on demand.

Task vectors and their arithmetic: Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from functools import cached_property
from html import escape
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from taskvec_formats import (
    Change,
    Checkpoint,
    Form,
    Header,
    Identity,
    Kind,
    LotaReader,
    LotaWriter,
    SparseTensor,
    TensorSpec,
)
from taskvec_formats.blocks import AUTO, CODECS
from taskvec_formats.checkpoint import short
from taskvec_formats.header import Block
from taskvec_formats.system.atomic import naming
from taskvec_formats.system.parallel import ordered_map, threads
from taskvec_formats.system.spool import Piece, Spools
from taskvec_formats.text import printable

from ..arguments import instance, one_of, real, said, truth, whole
from ..destination import appearing, check_file
from ..errors import UsageError
from ..hub.base import record as base_record
from ..packages import require
from ..reporting import bars
from ..reporting.progress import Progress, silent
from ..reporting.throughput import hashed
from .delta import BaseBits
from .digest import digest_of
from .encoding import encode as encode_change
from .found import open_vector
from .layers import counted, most, record, recorded
from .lineage import joined, lineage, shortened, stored_text
from .shrink import shrunk
from .source import Memory, Source, Stored, inputs_of
from .summary import summary_of
from .sums import Sum, Term, check_vector, common_specs

if TYPE_CHECKING:
    import torch

    from ..hub.push import Pushed


def check_codec(codec: str) -> None:
    """Check that a codec is one that files can be written with.

    Args:
        codec: The name of the codec.

    Raises:
        UsageError: The codec is unknown.
    """
    one_of("`codec`", codec, CODECS)


# the longest chain of lazy vectors: computing one recurses through those before it, and Python limits recursion
DEPTH = 100


class Made(Protocol):
    """A vector or sum term that other vectors are made of."""

    @property
    def depth(self) -> int:
        """The number of vectors that it is computed through."""


class TaskVector(Mapping[str, SparseTensor]):
    """A lazy mapping from tensor names to deltas, `SparseTensor` of f32, in the order of the names.

    A patch has the same interface but no deltas: its names can be listed, but reading a tensor raises KindError.

    Two vectors that were opened from files are equal if base, result and every block are the same; their names and
    provenance may differ. Any other vector is equal only to itself.

    a + b, a − b, −a, 2 * a and a / 2 are vectors too, computed in f32 when they are read or saved. Only deltas take
    part: replacements, which make a packed vector exact to the bit, belong to one pair of checkpoints and are dropped,
    and so are side files. Addition is commutative and associative to the byte; a − a is empty; 1 * a is a itself. These
    operations raise UsageError for a factor that is not finite, and the errors of `sums.common_specs`.

    Args:
        header: The kind, the base and tuned checkpoints, the removed tensors and the provenance.
        specs: The specs of the tensors.
        source: The source of the entries.
        name: The name of the vector.
        checkpoint: The base, if available. A saved file then has digests of the elements that the vector changes.
        made_of: The vectors that the entries are computed from.

    Attributes:
        header: As given.
        name: The name of the vector; the file name if it was opened from a file.
        specs: Tensor name -> TensorSpec: dtype, shape, eligibility, digests.
        depth: The number of vectors that it is computed through.

    Raises:
        UsageError: The vector would be computed through more than DEPTH others.
    """

    __array_ufunc__ = None  # otherwise numpy scalars would treat a vector as a list of names in a multiplication

    def __init__(
        self,
        header: Header,
        specs: Iterable[TensorSpec],
        source: Source,
        name: str = "task vector",
        checkpoint: Checkpoint | None = None,
        made_of: Iterable[Made] = (),
    ) -> None:
        self.depth = 1 + max((vector.depth for vector in made_of), default=-1)
        if self.depth > DEPTH:
            raise UsageError(
                f"{shortened(name)} would be computed through a chain of {self.depth} vectors, at most {DEPTH} are "
                "possible: save one of the intermediate vectors and open it"
            )
        self.header = header
        self.name = name
        self.specs = {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}
        self._source = source
        self._checkpoint = checkpoint
        self._leads_to: Identity | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, download: bool = True) -> TaskVector:
        """Open a `.lota` file. Entries are decoded when a tensor is read.

        Args:
            path: The file, or its reference on the Hugging Face Hub: `user/repo/file.lota`, or `user/repo` for the only
                `.lota` file of a repository, each with or without `@revision` and the prefix `hf://`. A local path of
                that name comes first.
            download: Whether a file of the Hub is downloaded to its cache, as is best for a vector that is used as a
                whole. If False, the header and the index are fetched, and the blocks of a tensor when it is read. Every
                part is checked as in a local file.

        Raises:
            FormatError: The file cannot be read, or is damaged.
            UsageError: The path does not exist, or is a checkpoint, a folder or a merge recipe.
            HubError: The file cannot be found on the Hub, or cannot be read or stored.
        """
        reader, name = open_vector(path, download=download)
        return cls(reader.header, reader.header.tensors, Stored(reader), name)

    @classmethod
    def from_pretrained(
        cls, repo: str, filename: str | None = None, *, revision: str | None = None, download: bool = True
    ) -> TaskVector:
        """Open a `.lota` file of a repository of the Hugging Face Hub.

        The token of the Hub's client is used: that of the environment variable HF_TOKEN, or of `hf auth login`.

        Args:
            repo: The repository, "user/repo". A local folder of that name is not read.
            filename: The path of the file in the repository. None for its only `.lota` file.
            revision: A branch, a tag or a commit. None for the main branch.
            download: As in `open`.

        Raises:
            FormatError: The file is damaged.
            UsageError: An argument is invalid.
            HubError: The file cannot be found on the Hub, or cannot be read or stored.
        """
        for what, value in (("repo", repo), ("filename", filename), ("revision", revision)):
            if not isinstance(value, str) and (what == "repo" or value is not None):
                raise UsageError(f"{what} must be a string, found {said(value)}")
        file = "" if filename is None else f"/{filename}"
        place = f"hf://{repo.removeprefix('hf://')}{file}" + ("" if revision is None else f"@{revision}")
        return cls.open(place, download=truth("download", download))

    def push_to_hub(
        self,
        repo: str,
        path_in_repo: str | None = None,
        *,
        revision: str | None = None,
        private: bool | None = None,
        message: str | None = None,
        create_pr: bool = False,
        progress: bool | Progress = False,
    ) -> Pushed:
        """Upload the vector to a repository of the Hugging Face Hub, with a model card.

        The file is verified first. A repository that does not exist is created. The file and the card are one commit.

        Args:
            repo: The repository, "user/repo".
            path_in_repo: The path of the file in the repository. None for the name of the vector.
            revision: The branch to commit to, created if it does not exist. None for the main branch.
            private: Whether a repository that is created is private. None for the default of the account.
            message: The message of the commit.
            create_pr: Whether to open a pull request instead of committing to the branch.
            progress: True shows progress bars. A callable receives (stage, done, total, note) at every step.

        Returns:
            The commit, and notes on what was kept of an existing model card.

        Raises:
            FormatError: A file that the vector reads is damaged.
            UsageError: An argument is invalid.
            HubError: The Hub cannot be reached or refuses the upload.
            MergeError, DiffError: As in `save`, for a vector that was not opened from a file.
        """
        from ..hub.push import destination, push

        to = destination(repo, path_in_repo, revision, name=f"{Path(self.name).name.removesuffix('.lota')}.lota")
        if message is not None:
            instance("message", message, str)
        chosen = None if private is None else truth("private", private)
        options: dict[str, Any] = {"private": chosen, "message": message, "create_pr": truth("create_pr", create_pr)}
        with bars.shown(progress) as report:
            reader = self._source.reader if isinstance(self._source, Stored) else None
            if reader is not None and reader.is_local and reader.path.is_file():
                return push(reader, to, progress=report, **options)
            with TemporaryDirectory() as folder:
                file = Path(folder) / "vector.lota"
                self.save(file, report)
                return push(LotaReader(file), to, progress=report, **options)

    @property
    def base(self) -> Identity:
        """The checkpoint that the vector was taken from."""
        return self.header.base

    @property
    def kind(self) -> Kind:
        """The kind of the vector, "vector" or "patch"."""
        return self.header.kind

    @property
    def provenance(self) -> dict[str, Any]:
        """How the vector was made."""
        return self.header.provenance

    @property
    def source(self) -> Source:
        """The source of the entries."""
        return self._source

    @property
    def file_size(self) -> int | None:
        """The size in bytes of the file that the vector was opened from; None if it was not."""
        return self._source.reader.size if isinstance(self._source, Stored) else None

    @property
    def leads_to(self) -> Identity | None:
        """The checkpoint that the base becomes, up to rounding if the header names none; None if unknown."""
        return self.header.tuned or self._leads_to

    @leads_to.setter
    def leads_to(self, checkpoint: Identity | None) -> None:
        self._leads_to = checkpoint

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files and folders that the vector reads, which no output may replace."""
        return inputs_of(self._source, *([self._checkpoint] if self._checkpoint else []))

    @property
    def digest(self) -> str:
        """16 hex digits that identify the vector: the digest of its base and of every block.

        A vector that was never stored has no blocks yet. Its result, its provenance and its entries are used instead.

        Raises:
            UsageError: The provenance cannot be stored.
        """
        if self.is_stored:
            return self._digest_of_file
        more: list[object] = [self.header.tuned, stored_text(self.name, self.provenance)]
        more += [] if self._source.content is None else [self._source.content]
        return digest_of(self.header.base, self.specs.values(), more)

    @cached_property
    def _digest_of_file(self) -> str:
        return digest_of(self.header.base, self.specs.values(), [])

    @property
    def is_stored(self) -> bool:
        """Whether the vector was opened from a file, so that its entries are counted and already computed."""
        return isinstance(self._source, Stored)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TaskVector) or not (self.is_stored and other.is_stored):
            return self is other
        return replace(self.header, provenance={}) == replace(other.header, provenance={})

    def __hash__(self) -> int:
        return hash(self.digest) if self.is_stored else id(self)

    def save(
        self,
        path: str | os.PathLike[str],
        progress: bool | Progress = silent,
        codec: str = AUTO,
        *,
        force: bool = False,
    ) -> None:
        """Write a `.lota` file, a few blocks at a time. It appears under its name when it is complete.

        Args:
            path: The file to write. Missing folders are created.
            progress: True shows progress bars. A callable receives (stage, done, total, note) at every step.
            codec: "auto" for the smallest file, "fast" for fast writing, "paper64" or "plain" (docs/format.md).
            force: Whether to replace an existing file of that name.

        Raises:
            OutputExistsError: `path` exists and `force` is False.
            FormatError: A delta is not a finite number, or a file that this vector reads is damaged.
            MergeError: The vector is a merge, and the entries of its parents cannot be combined.
            DiffError: A folder that the vector reads was changed or removed.
            UsageError: The codec is unknown; `path` is a file that this vector reads, even with `force`; or `path`
                cannot be written.
        """
        check_codec(codec)
        stored_text(self.name, self.provenance)
        path = check_file(path, force=truth("force", force), inputs=self.inputs)
        with bars.shown(progress) as report:
            jobs = ((spec, number) for spec in self.specs.values() for number in range(spec.form.block_count))
            workers = threads()
            base_bits = self._base_bits()

            def encode(job: tuple[int, tuple[TensorSpec, int]]) -> tuple[Block | None, Piece]:
                turn, (spec, number) = job
                base, span = base_bits(spec) if base_bits else None, spec.form.block(number)
                change = self._source.change(spec.name, *span, base)
                part = None if base is None else base[slice(*span)]
                block, data = encode_change(self.name, self.kind, spec, number, change, part, codec)
                with naming(path):
                    return block, spools.append(turn % workers, data)

            with (
                Spools(path.parent, workers) as spools,
                closing(ordered_map(encode, enumerate(jobs), processes=self._source.by_range)) as blocks,
            ):
                self.write(path, blocks, report, force=force)

    def _base_bits(self) -> BaseBits | None:
        return BaseBits(self._checkpoint) if self._checkpoint else None

    def encode(self, spec: TensorSpec, number: int, change: Change) -> tuple[Block | None, bytes]:
        """Encode a block of this vector whose change is known (`taskvec.training.writing`).

        Args:
            spec: The tensor.
            number: The number of the block.
            change: The change of the block.

        Returns:
            As `encode_block`, with the digests of the elements that the block changes.

        Raises:
            StreamError: A delta is not a finite number.
        """
        base_bits = self._base_bits()
        base = base_bits(spec)[slice(*spec.form.block(number))] if base_bits else None
        return encode_change(self.name, self.kind, spec, number, change, base, AUTO)

    def write(
        self, path: Path, blocks: Iterator[tuple[Block | None, bytes | Piece]], progress: Progress, *, force: bool
    ) -> None:
        """Write the file from encoded blocks (`taskvec.training.writing`). `save` encodes them itself.

        Args:
            path: The file, which is checked.
            blocks: The blocks of all tensors in their order, as `encode` returns them.
            progress: Called while the file is written.
            force: Whether to replace an existing file of that name.

        Raises:
            OutputExistsError: `path` exists and `force` is False.
        """
        header = replace(self.header, tensors=(), shards=None, files=None)
        with appearing(path), LotaWriter(path, header, replace=force) as writer:
            for done, spec in enumerate(self.specs.values()):
                progress("writing", done, len(self.specs), spec.name)
                writer.add(spec, (next(blocks) for _ in spec.form.blocks()))
            shards, files = self._source.shards(), self._source.files()
            if shards is not None:
                writer.add_shards(shards)
            if files is not None:
                writer.add_files(files)
        progress("writing", len(self.specs), len(self.specs), "")

    def summary(self) -> dict[str, Any]:
        """Return a summary of the vector as plain values, ready for JSON (`taskvec inspect --json`)."""
        return summary_of(self)

    def shrink(self, sparsity: float) -> TaskVector:
        """Return a vector of the k = round((1 − s)·N) entries of largest magnitude. Ties go to the first.

        Args:
            sparsity: s, the share of the N eligible weights that is left without an entry, in (0, 1).

        Returns:
            A vector whose entries are selected when they are first read or saved.

        Raises:
            UsageError: The sparsity is outside (0, 1), or the vector was opened from a file and has fewer than k
                entries.
            MaskError: k is 0. Reading or saving the result raises MaskError too, if the vector was opened from a file
                and fewer than k of its entries are non-zero.
            KindError: This is a patch.
            MergeError: It changes tensors that are not numeric, or adds, removes or resizes tensors.
        """
        header, specs, source = shrunk(self, sparsity)
        return TaskVector(header, specs.values(), source, self.name, made_of=[self])

    def to_torch(self, name: str, *, dense: bool = False) -> torch.Tensor:
        """Return the deltas of a tensor as a torch tensor, f32, in the tensor's shape, on the CPU.

        Args:
            name: The name of the tensor.
            dense: Whether to fill in zeros. If False, the result is a coalesced `torch.sparse_coo_tensor`.

        Raises:
            KeyError: The vector has no such tensor.
            KindError: This is a patch.
            UsageError: torch is not installed.
        """
        require("a torch tensor", "train", "torch")
        import torch

        delta = self[name]
        values = torch.from_numpy(delta.values.copy())
        if dense:
            flat = torch.zeros(delta.size)
            flat[torch.from_numpy(delta.indices.copy())] = values
            return flat.reshape(delta.shape)
        # a scalar has no coordinates to stack
        places = np.stack(np.unravel_index(delta.indices, delta.shape)) if delta.shape else np.empty((0, len(delta)))
        found: torch.Tensor = torch.sparse_coo_tensor(
            torch.from_numpy(places.astype(np.int64)), values, delta.shape, is_coalesced=True, check_invariants=True
        )
        return found

    def __repr__(self) -> str:
        facts = [f"{len(self)} tensors of {self.base.name!r}"]
        if self.is_stored:
            summary = self.summary()
            facts.append(f"{summary['entries']:,} entries, density {summary['density']:.2%}")
        else:
            facts.append("computed when it is read")
        return f"<TaskVector {self.name!r}: {self.kind}, {', '.join(facts)}>"

    def _repr_html_(self) -> str:
        """Return an HTML table for notebooks."""
        summary = self.summary()
        rows = {"base": self.base.name, "kind": self.kind, "tensors": f"{len(self):,}"}
        if summary["entries"] is not None:
            rows |= {"entries": f"{summary['entries']:,}", "density": f"{summary['density']:.2%}"}
        rows |= {"eligible weights": f"{self.eligible:,}", "made by": str(self.provenance.get("made_by", "unknown"))}
        cells = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows.items())
        return f"<table><caption>{escape(printable(self.name, 80))}</caption>{cells}</table>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a vector from a file as the path of the file, or as its reference on the Hub.

        Raises:
            UsageError: The vector is computed when it is read.
        """
        if not isinstance(self._source, Stored):
            raise UsageError(
                f"{self.name} is computed when it is read and cannot be pickled: save it and open the file"
            )
        return _reopened, (self._source.place, self.digest)

    def __getitem__(self, name: str) -> SparseTensor:
        if name not in self.specs:
            raise KeyError(name)
        return self.change(name).delta.reshaped(self.specs[name].shape)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def change(self, name: str, start: int = 0, stop: int | None = None) -> Change:
        """Return the change of the elements [start, stop) of a tensor.

        Args:
            name: The tensor.
            start: The first element.
            stop: The end of the range. None is the end of the tensor.

        Raises:
            KindError: This is a patch, which cannot be read without its base.
            UsageError: The vector has no such tensor, or the tensor no such range.
        """
        check_vector(self.name, self.header)
        if name not in self.specs:
            raise UsageError(f"{shortened(self.name)} has no tensor {said(name)}")
        size = self.specs[name].size
        start, stop = whole("start", start), size if stop is None else whole("stop", stop)
        if not 0 <= start <= stop <= size:
            raise UsageError(
                f"tensor {name!r} has {size} elements: {said(start)} to {said(stop)} is not a range of them"
            )
        return self._source.change(name, start, stop)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __add__(self, other: TaskVector) -> TaskVector:
        return _sum([*self._terms(), *other._terms()], self, other) if _is_vector(other) else NotImplemented

    def __radd__(self, other: object) -> TaskVector:
        # sum() starts with 0
        return self if type(other) is int and other == 0 else NotImplemented

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self + -other if _is_vector(other) else NotImplemented

    def __neg__(self) -> TaskVector:
        return self * -1

    def __mul__(self, factor: float | Decimal) -> TaskVector:
        if not _is_number(factor):
            return NotImplemented
        number = real("a factor", factor)
        if number == 1:
            return self
        return _sum([replace(term, weight=term.weight * number) for term in self._terms()], self)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Decimal) -> TaskVector:
        if not _is_number(divisor):
            return NotImplemented
        number = real("a divisor", divisor)
        if number == 0 or not math.isfinite(number):
            raise UsageError(f"{self.name} can only be divided by a finite non-zero number, found {said(divisor)}")
        return self * (1 / number)

    def _terms(self) -> list[Term]:
        if isinstance(self._source, Sum):
            return self._source.terms
        record = stored_text(self.name, self.provenance)
        return [Term(1.0, self.name, self.digest, self.header, self._source, self.specs, self.depth, record)]

    @property
    def eligible(self) -> int:
        """The number of elements of all eligible tensors."""
        return sum(spec.size for spec in self.specs.values() if spec.eligible)


# plain bools, because mypy would report `NotImplemented` as unreachable if these narrowed the type
def _is_vector(value: object) -> bool:
    return isinstance(value, TaskVector)


def _is_number(value: object) -> bool:
    return isinstance(value, (Real, Decimal))


def _reopened(path: str, digest: str) -> TaskVector:
    """Open a vector that was pickled.

    Raises:
        UsageError: The file contains another vector now.
        FormatError: The file cannot be read.
    """
    vector = TaskVector.open(path, download=False)
    if vector.digest != digest:
        raise UsageError(f"{path}: the file was replaced after this vector was pickled or copied")
    return vector


def _sum(terms: Iterable[Term], *parts: TaskVector) -> TaskVector:
    """Return the sum of terms.

    Args:
        terms: The terms.
        parts: The vectors that the terms come from, so that a sum of many vectors need not compare all of them again.
    """
    source = Sum(terms, common_specs([(part.name, part.header, part.specs) for part in parts]))
    terms = source.terms
    header = Header("vector", terms[0].header.base, None, tensors=())
    layers = most([*(counted(part.specs) for part in parts), *(recorded(part.provenance) for part in parts)])
    made = lineage(terms, [term.weight for term in terms])
    header.provenance.update(made_by="arith", **made, **record(source.specs, layers))
    name = joined((f"{term.weight:g} * {term.name}" for term in terms), " + ")
    return TaskVector(header, source.specs.values(), source, name, made_of=terms)


def vector_of(
    base: Checkpoint,
    forms: Mapping[str, Form],
    deltas: Mapping[str, SparseTensor],
    provenance: Mapping[str, Any],
    progress: Progress = silent,
    name: str = "task vector",
) -> TaskVector:
    """Return a vector in memory.

    Args:
        base: The base.
        forms: Tensor name -> Form of the eligible tensors.
        deltas: Tensor name -> f32 entries, for some or all of these tensors.
        provenance: How the vector was made.
        progress: Called while the base is hashed.
        name: The name of the vector.

    Raises:
        UsageError: The deltas of a tensor have another dtype or size, or belong to no tensor.
    """
    specs = specs_of(base, forms, progress)
    return TaskVector(header_of(base, specs, provenance), specs.values(), Memory(deltas, specs), name, base)


def specs_of(base: Checkpoint, forms: Mapping[str, Form], progress: Progress = silent) -> dict[str, TensorSpec]:
    """Return the specs of tensors that keep the form that they have in the base.

    Args:
        base: The base.
        forms: Tensor name -> Form.
        progress: Called while the base is hashed.
    """
    digests = hashed(base, "base", progress)
    return {name: TensorSpec.like(name, form, short(digests[name])) for name, form in forms.items()}


def header_of(base: Checkpoint, names: Iterable[str], provenance: Mapping[str, Any]) -> Header:
    """Return the header of a vector whose tuned checkpoint is unknown.

    Args:
        base: The base.
        names: The tensors of the vector.
        provenance: How the vector was made.
    """
    complete = {**provenance, **record(names, counted(base.tensors)), **base_record(base)}
    return Header("vector", Identity(base.name, base.fingerprint), None, tensors=(), provenance=complete)
