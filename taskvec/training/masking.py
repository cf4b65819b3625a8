"""Where a ticket's mask comes from, besides the largest changes of all: tensor by tensor, at random, another vector.

And what it must leave out: LoTTO (arXiv 2406.16797, section 3) keeps the masks of a sequence of tasks disjoint.
A mask is a dict tensor name -> flat positions, int64, increasing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count

import numpy as np

from taskvec_formats import Form
from taskvec_formats.sparse import Indices

from ..errors import MaskError
from ..reporting.progress import Progress, silent
from ..vectors.topk import FloatArray, top_k
from ..vectors.vector import TaskVector

Masks = dict[str, Indices]


def quotas(k: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """k entries shared out by the tensors' sizes: rounded down, and one more where most was cut off, the first of ties.

    They add up to k, as those of one global mask do.
    """
    total = sum(sizes.values())
    shares = {name: k * size // total for name, size in sizes.items()}
    cut = sorted(sizes, key=lambda name: -(k * sizes[name] % total))
    for name in cut[: k - sum(shares.values())]:
        shares[name] += 1
    return shares


def top_k_each(deltas: Iterable[tuple[str, FloatArray]], wanted: Mapping[str, int]) -> Masks:
    """The largest magnitudes of each tensor by itself, as many as wanted. Raises MaskError, naming the tensor."""
    masks = {}
    for name, delta in deltas:
        try:
            chosen = top_k(lambda: [(name, delta)], wanted[name]) if wanted[name] else None  # noqa: B023 - used at once
        except MaskError as error:
            raise MaskError(f"tensor {name!r}: {error}") from None
        masks[name] = chosen.indices(name, delta) if chosen else np.empty(0, np.int64)
    return masks


def largest(
    scores: Callable[[str], FloatArray],
    forms: Mapping[str, Form],
    k: int,
    scope: str,
    taken: Masks,
    progress: Progress = silent,
) -> Masks:
    """The k positions of largest score that are not taken, over all tensors or shared out among them.

    scores: of a tensor, f32 [size]; asked for several times. scope: "global" or "tensor".
    Raises MaskError where fewer than k are free and not zero.
    """
    passes, in_all = count(), (4 if scope == "global" else 1) * len(forms)

    def free_scores() -> Iterator[tuple[str, FloatArray]]:
        start = next(passes) * len(forms)
        for done, name in enumerate(forms, start):
            progress("choosing the mask", done, in_all, "")
            values = scores(name)
            values[taken.get(name, [])] = 0  # a zero is never chosen
            yield name, values

    if scope == "global":
        selection = top_k(free_scores, k)
        masks = {name: selection.indices(name, values) for name, values in free_scores()}
    else:
        masks = top_k_each(free_scores(), quotas(k, {name: form.size for name, form in forms.items()}))
    progress("choosing the mask", in_all, in_all, "")
    return masks


def random_mask(k: int, forms: Mapping[str, Form], taken: Masks, seed: int) -> Masks:
    """k positions drawn uniformly from all that are not taken, the same for the same seed.

    They are the largest of random magnitudes, so that a tensor at a time is held, however large the model.
    Raises MaskError where fewer are free.
    """

    def magnitudes() -> Iterator[tuple[str, FloatArray]]:
        for number, (name, form) in enumerate(forms.items()):
            drawn = 1 - np.random.default_rng((seed, number)).random(form.size, np.float32)  # (0, 1]
            drawn[taken.get(name, [])] = 0  # a zero is never chosen
            yield name, drawn

    chosen = top_k(magnitudes, k)
    return {name: chosen.indices(name, drawn) for name, drawn in magnitudes()}


def mask_of(vector: TaskVector, forms: Mapping[str, Form], taken: Masks, k: int | None) -> Masks:
    """The positions that a vector holds and that are not taken; of these the k of largest magnitude, or all.

    Raises MaskError where a tensor of the vector is not among `forms` or has another shape, or too few are left.
    """
    check_forms(vector, forms)

    def entries(name: str) -> tuple[Indices, FloatArray]:
        held = vector[name]
        free = ~np.isin(held.indices, taken.get(name, ()), assume_unique=True)
        return held.indices[free], held.values[free]

    if k is None:
        masks = {name: entries(name)[0] for name in vector}
        if not any(map(len, masks.values())):
            raise MaskError(f"{vector.name} holds no position that is free")
        return masks
    try:
        chosen = top_k(lambda: ((name, entries(name)[1]) for name in vector), k)
    except MaskError as error:
        raise MaskError(f"{vector.name}: {error}") from None
    masks = {}
    for name in vector:
        indices, values = entries(name)
        masks[name] = indices[chosen.indices(name, values)]
    return masks


def taken_by(vectors: Sequence[TaskVector], forms: Mapping[str, Form]) -> Masks:
    """tensor name -> the positions that any of the vectors holds (LoTTO, arXiv 2406.16797, section 3).

    Raises MaskError where a tensor of a vector is not among `forms` or has another shape.
    """
    taken: Masks = {}
    for vector in vectors:
        check_forms(vector, forms)
        for name in vector:
            held = vector.change(name).touched()
            taken[name] = np.union1d(taken[name], held) if name in taken else held
    return taken


def check_forms(vector: TaskVector, forms: Mapping[str, Form]) -> None:
    """Raise MaskError, naming the tensor, where the mask of a vector does not fit the eligible tensors."""
    for name, spec in vector.specs.items():
        if name not in forms:
            raise MaskError(f"{vector.name} holds tensor {name!r}, which is not eligible here")
        if spec.shape != forms[name].shape:
            raise MaskError(f"tensor {name!r} is {list(spec.shape)} in {vector.name}, {list(forms[name].shape)} here")


def free_share(masks: Sequence[Masks], forms: Mapping[str, Form]) -> dict[str, float]:
    """tensor name -> the share of its weights that none of some disjoint masks holds."""
    return {
        name: 1 - sum(len(mask.get(name, ())) for mask in masks) / form.size
        for name, form in forms.items()
        if form.size
    }
