"""Tables of evaluations: variants of a model × data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..vectors.vector import TaskVector
from .evaluate import Evaluation
from .variants import Variant


@dataclass(frozen=True)
class GridRow:
    """The evaluations of one variant of a model.

    Attributes:
        name: The name of the vectors, joined by " + "; "base" if there are none.
        vectors: The vectors.
        method: The method of their merge; None if there are fewer than two.
        evaluations: Name of a data set -> Evaluation.
        notes: Sentences about the merge.
    """

    name: str
    vectors: tuple[TaskVector, ...]
    method: str | None
    evaluations: Mapping[str, Evaluation]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluationGrid:
    """The evaluations of several variants of a model on several data sets. `str` gives a table.

    Attributes:
        rows: One row for each variant.
    """

    rows: tuple[GridRow, ...]

    @property
    def header(self) -> list[str]:
        """The titles of the columns: "model", then one for each data set and metric."""
        first = self.rows[0].evaluations
        return ["model", *(f"{data} {metric}" for data, found in first.items() for metric in found.metrics)]

    def cells(self) -> list[list[str]]:
        """Return the rows as text: the name, then each metric with its standard error."""
        return [
            [row.name, *(str(value) for found in row.evaluations.values() for value in found.metrics.values())]
            for row in self.rows
        ]

    def __str__(self) -> str:
        lines = [self.header, *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(_padded(line, widths)) for line in lines)


def _padded(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for number, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        yield cell.rjust(width) if number else cell.ljust(width)


def grid_of(variants: Sequence[Variant], found: Sequence[Mapping[str, Evaluation]]) -> EvaluationGrid:
    """Combine variants with their evaluations."""
    return EvaluationGrid(
        tuple(
            GridRow(one.name, one.parents, None if one.merged is None else str(one.merged["method"]), row, one.notes)
            for one, row in zip(variants, found, strict=True)
        )
    )
