"""Tickets trained one after another, each on the largest entries of the one before (arXiv 2406.16797, 99 %*)."""

from __future__ import annotations

from dataclasses import replace

from .options import AUTO, TrainingOptions
from .rates import default_of, rounded


def previous(options: TrainingOptions) -> TrainingOptions:
    """Options of the ticket that is trained before the one of `options`, and that its mask is taken from.

    The ratio of the two learning rates is that of the defaults for the two densities. With "auto" each finds its own.

    Args:
        options: Options with `via` and learning rates.
    """
    *earlier, sparsity = options.via
    found = replace(options, sparsity=sparsity, via=tuple(earlier))
    if options.lr is None or options.lr == AUTO:
        return found
    assert options.sparsity is not None
    before, after = default_of(found, 1 - sparsity), default_of(options, 1 - options.sparsity)
    return replace(found, lr=rounded(float(options.lr) * before / after))


def chain(options: TrainingOptions) -> list[TrainingOptions]:
    """Options of all tickets of a run, in the order in which they are trained.

    Args:
        options: The options of the run, with learning rates.
    """
    return [*(chain(previous(options)) if options.via else []), options]


def label(options: TrainingOptions) -> str:
    """What the stages of a ticket that is not the last one are shown with.

    Args:
        options: The options of the ticket.
    """
    assert options.sparsity is not None
    return f"{100 * options.sparsity:.6g}%: "
