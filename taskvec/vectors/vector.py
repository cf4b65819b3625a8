"""The task vector: what fine-tuning added to a base model, tensor by tensor, loaded when asked for.

Source of the notion and its arithmetic: Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from html import escape
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from taskvec_formats import (
    Change,
    Checkpoint,
    Form,
    Header,
    Identity,
    LotaWriter,
    SparseTensor,
    TensorSpec,
)
from taskvec_formats.blocks import AUTO, CODECS, encode_block, touched_digest
from taskvec_formats.checkpoint import short
from taskvec_formats.dtypes import BitArray
from taskvec_formats.errors import StreamError
from taskvec_formats.header import Block
from taskvec_formats.parallel import ordered_map
from taskvec_formats.text import printable

from ..arguments import one_of, real, said, whole
from ..destination import appearing, check_file
from ..errors import UsageError
from ..reporting.progress import Progress, silent
from .delta import BaseBits, touched_bits
from .digest import digest_of
from .found import open_lota
from .layers import counted, most, record, recorded
from .lineage import joined, lineage, shortened, stored_text
from .shrink import shrunk
from .source import Memory, Source, Stored, inputs_of
from .summary import summary_of
from .sums import Sum, Term, check_vector, common_specs

if TYPE_CHECKING:
    import torch


def check_codec(codec: str) -> None:
    """Raise UsageError for a codec that a writer cannot be asked for."""
    one_of("codec", codec, CODECS)


# each is computed from those before it, in a recursion that Python bounds
DEPTH = 100


class Made(Protocol):
    """What others are made of. depth: how many vectors it is itself computed through."""

    @property
    def depth(self) -> int: ...


class TaskVector(Mapping[str, SparseTensor]):
    """A lazy mapping tensor name -> SparseTensor of f32 deltas, in the order of the names.

    header: kind, base and tuned checkpoint, removed tensors, provenance. name: what to call it, the file name where it
    came from a file. specs: tensor name -> TensorSpec: dtype, shape, eligibility, digests.
    A patch has the same parts but no deltas: its names can be asked for, reading one raises KindError.
    leads_to: the checkpoint that the base becomes, but for roundings where the header knows none; None where not known.
    Two vectors that were opened from files are equal where these say the same of base, result and every block,
    whatever their names and provenance; any other vector is equal to itself alone.

    a + b, a − b, −a, 2 * a and a / 2 are vectors too, computed when they are read or saved, in f32, of deltas alone:
    replacements, which make a packed vector exact to the bit, belong to one pair of checkpoints and do not travel, nor
    do side files. a + b is b + a, and (a + b) + c is a + (b + c), to the byte; a − a is empty; 1 * a is a itself. They
    raise UsageError for a factor that is not finite and the errors of `sums.common_specs`.
    """

    __array_ufunc__ = None  # else numpy's numbers would take a vector for a list of names, and not be its factors

    def __init__(
        self,
        header: Header,
        specs: Iterable[TensorSpec],
        source: Source,
        name: str = "task vector",
        checkpoint: Checkpoint | None = None,
        made_of: Iterable[Made] = (),
    ) -> None:
        """checkpoint: the base, where it is at hand; what is saved then vouches for the elements that it touches.

        made_of: the vectors that its entries are computed from. Raises UsageError where more than DEPTH are computed
        one from another.
        """
        self.depth = 1 + max((vector.depth for vector in made_of), default=-1)
        if self.depth > DEPTH:
            raise UsageError(
                f"{shortened(name)} would be computed through {self.depth} vectors in a row, at most {DEPTH} are "
                "possible: save one of those in between and open it"
            )
        self.header = header
        self.name = name
        self.specs = {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}
        self._source = source
        self._checkpoint = checkpoint
        self._leads_to: Identity | None = None

    @classmethod
    def open(cls, path: str | Path) -> TaskVector:
        """Open a `.lota` file; entries are decoded when a tensor is asked for.

        Raises FormatError, and UsageError for a folder or a recipe.
        """
        reader = open_lota(Path(path))
        return cls(reader.header, reader.header.tensors, Stored(reader), Path(path).name)

    @property
    def base(self) -> Identity:
        """The checkpoint it was taken from."""
        return self.header.base

    @property
    def kind(self) -> str:
        """Whether it is a vector or a patch."""
        return self.header.kind

    @property
    def provenance(self) -> dict[str, Any]:
        """How it came about."""
        return self.header.provenance

    @property
    def source(self) -> Source:
        """Where the entries come from."""
        return self._source

    @property
    def leads_to(self) -> Identity | None:
        return self.header.tuned or self._leads_to

    @leads_to.setter
    def leads_to(self, checkpoint: Identity | None) -> None:
        self._leads_to = checkpoint

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files and folders that it reads, which no output may replace."""
        return inputs_of(self._source, *([self._checkpoint] if self._checkpoint else []))

    @property
    def digest(self) -> str:
        """16 hex digits that tell one vector from another: of what it says of its base and of every block.

        One that was never stored has no blocks yet: then of its result and its provenance instead.
        Raises UsageError where that cannot be stored.
        """
        more = [] if self.is_stored else [self.header.tuned, stored_text(self.name, self.provenance)]
        return digest_of(self.header.base, self.specs.values(), more)

    @property
    def is_stored(self) -> bool:
        """Whether it was opened from a file, so that its entries are counted and need no computing."""
        return isinstance(self._source, Stored)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TaskVector) or not (self.is_stored and other.is_stored):
            return self is other
        return replace(self.header, provenance={}) == replace(other.header, provenance={})

    def __hash__(self) -> int:
        return hash(self.digest) if self.is_stored else id(self)

    def save(self, path: str | Path, progress: Progress = silent, codec: str = AUTO, *, force: bool = False) -> None:
        """Write a `.lota` file, a few blocks in memory at a time, under its name only when complete.

        Args:
            path: The file to write; missing folders are made.
            progress: Told of every tensor.
            codec: "auto", the smallest; "fast", quickly written; "paper64" or "plain" (docs/format.md).
            force: Whether a file of that name is replaced.

        Raises:
            OutputExistsError: `path` exists and `force` is not given.
            StreamError: A delta is not a finite number.
            UsageError: The codec is unknown; `path` is a file that this vector reads, whatever `force` is; or no file
                can be written there.
        """
        check_codec(codec)
        stored_text(self.name, self.provenance)
        path = check_file(path, force=force, inputs=self.inputs)
        base_bits = BaseBits(self._checkpoint) if self._checkpoint else None

        def encode(job: tuple[TensorSpec, int]) -> tuple[Block | None, bytes]:
            spec, number = job
            span = spec.form.block(number)
            base = base_bits(spec) if base_bits else None
            change = self._source.change(spec.name, *span, base)
            beside = None if base is None else base[slice(*span)]
            try:
                block, data = encode_block(spec.form, change, beside if self.kind == "patch" else None, codec)
            except StreamError as error:
                raise StreamError(f"{self.name}: tensor {spec.name!r}: {error}") from None
            if block:
                before, after = self._digests(spec, number, change, beside)
                block = replace(block, before=before, after=after)
            return block, data

        header = replace(self.header, tensors=(), shards=None, files=None)
        jobs = ((spec, number) for spec in self.specs.values() for number in range(spec.form.block_count))
        with (
            appearing(path),
            LotaWriter(path, header, replace=force) as writer,
            closing(ordered_map(encode, jobs, processes=self._source.by_range)) as blocks,
        ):
            for done, spec in enumerate(self.specs.values()):
                progress("writing", done, len(self.specs), spec.name)
                writer.add(spec, (next(blocks) for _ in spec.form.blocks()))
            shards, files = self._source.shards(), self._source.files()
            if shards is not None:
                writer.add_shards(shards)
            if files is not None:
                writer.add_files(files)
        progress("writing", len(self.specs), len(self.specs), "")

    def _digests(
        self, spec: TensorSpec, number: int, change: Change, base: BitArray | None
    ) -> tuple[str | None, str | None]:
        if base is None:
            # a file that is saved again keeps what it vouched for
            known = spec.blocks[number] if spec.blocks else None
            return (known.before, known.after) if known else (None, None)
        start = spec.form.block(number)[0]
        before, after = touched_bits(spec.dtype, base, change)
        return touched_digest(spec, start, before), touched_digest(spec, start, after)

    def summary(self) -> dict[str, Any]:
        """What the vector holds, as a dictionary of plain values, ready for JSON (`taskvec inspect --json`)."""
        return summary_of(self)

    def shrink(self, sparsity: float) -> TaskVector:
        """The k = round((1 − s)·N) entries of largest magnitude; ties go to the first.

        Args:
            sparsity: s, the share of the N eligible weights that is left without an entry, in (0, 1).

        Returns:
            A vector whose entries are chosen when they are first read or saved.

        Raises:
            UsageError: The sparsity is outside (0, 1), or the vector, opened from a file, has fewer entries than k.
            MaskError: k is 0.
            KindError: This is a patch.
            MergeError: It changes tensors that are no numbers, or adds, removes or resizes tensors.
        """
        header, specs, source = shrunk(self, sparsity)
        return TaskVector(header, specs.values(), source, self.name, made_of=[self])

    def to_torch(self, name: str, *, dense: bool = False) -> torch.Tensor:
        """The deltas of a tensor as a torch tensor, f32, of the tensor's shape, on the CPU.

        Args:
            name: Of the tensor.
            dense: Whether to fill in zeros; else the result is a coalesced `torch.sparse_coo_tensor`.

        Raises:
            KeyError: The vector has no such tensor.
            KindError: This is a patch.
        """
        import torch

        delta = self[name]
        values = torch.from_numpy(delta.values.copy())
        if dense:
            flat = torch.zeros(delta.size)
            flat[torch.from_numpy(delta.indices.copy())] = values
            return flat.reshape(delta.shape)
        # a tensor of no axes has no coordinates
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
        """A table for notebooks."""
        summary = self.summary()
        rows = {"base": self.base.name, "kind": self.kind, "tensors": f"{len(self):,}"}
        if summary["entries"] is not None:
            rows |= {"entries": f"{summary['entries']:,}", "density": f"{summary['density']:.2%}"}
        rows |= {"eligible weights": f"{self.eligible:,}", "made by": str(self.provenance.get("made_by", "unknown"))}
        cells = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows.items())
        return f"<table><caption>{escape(printable(self.name, 80))}</caption>{cells}</table>"

    def __reduce__(self) -> tuple[Any, ...]:
        """A vector from a file is pickled as the path of the file.

        Raises:
            UsageError: It is computed when it is read.
        """
        if not isinstance(self._source, Stored):
            raise UsageError(
                f"{self.name} is computed when it is read and cannot be pickled: save it and open the file"
            )
        return TaskVector.open, (str(self._source.reader.path.absolute()),)

    def __getitem__(self, name: str) -> SparseTensor:
        if name not in self.specs:
            raise KeyError(name)
        return self.change(name).delta.reshaped(self.specs[name].shape)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def change(self, name: str, start: int = 0, stop: int | None = None) -> Change:
        """What happens to the elements [start, stop) of a tensor.

        Raises KindError for a patch, which needs a base, UsageError for a tensor or a range that is not there.
        """
        check_vector(self.name, self.header)
        if name not in self.specs:
            raise UsageError(f"{shortened(self.name)} has no tensor {said(name)}")
        size = self.specs[name].size
        start, stop = whole("start", start), size if stop is None else whole("stop", stop)
        if not 0 <= start <= stop <= size:
            raise UsageError(f"tensor {name!r} has {size} elements: {said(start)} to {said(stop)} is no range of them")
        return self._source.change(name, start, stop)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __add__(self, other: TaskVector) -> TaskVector:
        return _sum([*self._terms(), *other._terms()], self, other) if _is_vector(other) else NotImplemented

    def __radd__(self, other: object) -> TaskVector:
        # what sum() begins with
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
            raise UsageError(f"{self.name} can be divided by finite numbers other than zero, found {said(divisor)}")
        return self * (1 / number)

    def _terms(self) -> list[Term]:
        if isinstance(self._source, Sum):
            return self._source.terms
        record = stored_text(self.name, self.provenance)
        return [Term(1.0, self.name, self.digest, self.header, self._source, self.specs, self.depth, record)]

    @property
    def eligible(self) -> int:
        """Elements of all eligible tensors."""
        return sum(spec.size for spec in self.specs.values() if spec.eligible)


# plain truth values: a type that is narrowed would make what Python asks of operators unreachable
def _is_vector(value: object) -> bool:
    return isinstance(value, TaskVector)


def _is_number(value: object) -> bool:
    return isinstance(value, (Real, Decimal))


def _sum(terms: Iterable[Term], *parts: TaskVector) -> TaskVector:
    """parts: what the terms are those of, so that sums of many vectors need not be compared anew."""
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
) -> TaskVector:
    """A vector in memory.

    forms: tensor name -> Form of the eligible tensors. deltas: tensor name -> f32 entries, of some of them.
    """
    specs = specs_of(base, forms, progress)
    return TaskVector(header_of(base, specs, provenance), specs.values(), Memory(deltas, specs), checkpoint=base)


def specs_of(base: Checkpoint, forms: Mapping[str, Form], progress: Progress = silent) -> dict[str, TensorSpec]:
    """The specs of tensors that keep the base's form."""
    digests = base.digests(lambda done, total: progress("hashing base", done, total, ""))
    return {name: TensorSpec.like(name, form, short(digests[name])) for name, form in forms.items()}


def header_of(base: Checkpoint, names: Iterable[str], provenance: Mapping[str, Any]) -> Header:
    """The header of a vector of these tensors that knows no tuned checkpoint."""
    said = {**provenance, **record(names, counted(base.tensors))}
    return Header("vector", Identity(base.name, base.fingerprint), None, tensors=(), provenance=said)
