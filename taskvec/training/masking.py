"""Masks that are not the global top k: per tensor, random, or taken from another vector; and positions to exclude.

LoTTO (arXiv 2406.16797, section 3) keeps the masks of a sequence of tasks disjoint. A mask is a dict of tensor name ->
flat positions, int64, increasing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count

import numpy as np

from taskvec_formats import Form
from taskvec_formats.sparse import Indices

from ..errors import MaskError
from ..reporting.progress import Progress, silent
from ..vectors.topk import FloatArray, Parts, top_k
from ..vectors.vector import TaskVector

CHOOSING = "choosing the mask"
Masks = dict[str, Indices]
Kept = Callable[[str, Indices], Indices]  # those of a tensor's positions that this process has


def every(name: str, indices: Indices) -> Indices:
    """Keep all positions, as a process does that has the whole model."""
    return indices


def quotas(k: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Distribute k entries among tensors in proportion to their sizes.

    Shares are rounded down. The remaining entries go to the tensors with the largest remainders, the first of ties, so
    that the shares add up to k.

    Args:
        k: Number of entries.
        sizes: Tensor name -> number of weights.

    Returns:
        Tensor name -> number of entries.
    """
    total = sum(sizes.values())
    shares = {name: k * size // total for name, size in sizes.items()}
    cut = sorted(sizes, key=lambda name: -(k * sizes[name] % total))
    for name in cut[: k - sum(shares.values())]:
        shares[name] += 1
    return shares


def top_k_each(
    deltas: Iterable[tuple[str, FloatArray]],
    wanted: Mapping[str, int],
    parts: Parts | None = None,
    nonzero: str = "weights changed",
) -> Masks:
    """Select the largest magnitudes of each tensor separately.

    Args:
        deltas: (tensor name, f32 [size]) pairs.
        wanted: Tensor name -> number of entries to select.
        parts: As in `top_k`.
        nonzero: As in `top_k`.

    Raises:
        MaskError: A tensor has fewer nonzero values. The message names it.
    """
    masks = {}
    for name, delta in deltas:
        try:
            values = [(name, delta)]
            chosen = top_k(lambda: values, wanted[name], parts=parts, nonzero=nonzero) if wanted[name] else None  # noqa: B023 - used at once
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
    parts: Parts | None = None,
    nonzero: str = "weights changed",
) -> Masks:
    """Select the k positions with the largest scores that are not taken.

    If processes divide the tensors, each gives the scores of the elements that it has, and gets the positions among
    them.

    Args:
        scores: Returns the scores of a tensor, f32 [size]. Called several times per tensor.
        forms: Tensor name -> Form of the eligible tensors.
        k: Number of positions.
        scope: "global" ranks all tensors together; "tensor" distributes k among them by size.
        taken: Positions that may not be selected, among those that the scores are of.
        progress: Called with the stage, the tensors done, the tensors in all, and a note.
        parts: As in `top_k`.
        nonzero: As in `top_k`.

    Raises:
        MaskError: Fewer than k positions are free and have a nonzero score.
    """
    passes, in_all = count(), (4 if scope == "global" else 1) * len(forms)

    def free_scores() -> Iterator[tuple[str, FloatArray]]:
        start = next(passes) * len(forms)
        for done, name in enumerate(forms, start):
            progress(CHOOSING, done, in_all, "")
            values = scores(name)
            values[taken.get(name, [])] = 0  # zeros are never selected
            yield name, values

    if scope == "global":
        selection = top_k(free_scores, k, parts=parts, nonzero=nonzero)
        masks = {name: selection.indices(name, values) for name, values in free_scores()}
    else:
        wanted = quotas(k, {name: form.size for name, form in forms.items()})
        masks = top_k_each(free_scores(), wanted, parts, nonzero)
    progress(CHOOSING, in_all, in_all, "")
    return masks


def random_mask(k: int, forms: Mapping[str, Form], taken: Masks, seed: int, kept: Kept = every) -> Masks:
    """Draw k positions uniformly from those that are not taken. The result depends only on the seed and the forms.

    The positions are those of the largest of random magnitudes, so only one tensor is in memory at a time.

    Args:
        k: Number of positions.
        forms: Tensor name -> Form of the eligible tensors.
        taken: Positions that may not be selected.
        seed: Seed of the draw.
        kept: Returns the positions to return, of those that are drawn.

    Raises:
        MaskError: Fewer than k positions are free.
    """

    def magnitudes() -> Iterator[tuple[str, FloatArray]]:
        for number, (name, form) in enumerate(forms.items()):
            drawn = 1 - np.random.default_rng((seed, number)).random(form.size, np.float32)  # (0, 1]
            drawn[taken.get(name, [])] = 0  # zeros are never selected
            yield name, drawn

    chosen = top_k(magnitudes, k)
    return {name: kept(name, chosen.indices(name, drawn)) for name, drawn in magnitudes()}


def mask_of(vector: TaskVector, forms: Mapping[str, Form], taken: Masks, k: int | None, kept: Kept = every) -> Masks:
    """Use the positions of a vector that are not taken as a mask.

    Args:
        vector: The vector.
        forms: Tensor name -> Form of the eligible tensors.
        taken: Positions that may not be selected.
        k: Number of positions of largest magnitude to select; None selects all.
        kept: Returns the positions to return, of those that are selected.

    Raises:
        MaskError: A tensor of the vector is not in `forms` or has another shape, or too few positions are left.
    """
    check_forms(vector, forms)

    def entries(name: str) -> tuple[Indices, FloatArray]:
        held = vector[name]
        free = ~np.isin(held.indices, taken.get(name, ()), assume_unique=True)
        return held.indices[free], held.values[free]

    masks: Masks = {}
    if k is None:
        found = 0
        for name in vector:
            indices, _ = entries(name)
            found += len(indices)
            masks[name] = kept(name, indices)
        if not found:
            raise MaskError(f"{vector.name} contains no position that is free")
        return masks
    try:
        chosen = top_k(lambda: ((name, entries(name)[1]) for name in vector), k)
    except MaskError as error:
        raise MaskError(f"{vector.name}: {error}") from None
    for name in vector:
        indices, values = entries(name)
        masks[name] = kept(name, indices[chosen.indices(name, values)])
    return masks


def taken_by(vectors: Sequence[TaskVector], forms: Mapping[str, Form], kept: Kept = every) -> Masks:
    """Positions that any of the vectors has an entry for (LoTTO, arXiv 2406.16797, section 3).

    Args:
        vectors: Vectors of earlier tasks.
        forms: Tensor name -> Form of the eligible tensors.
        kept: Returns the positions to return, of all.

    Raises:
        MaskError: A tensor of a vector is not in `forms` or has another shape.
    """
    taken: Masks = {}
    for vector in vectors:
        check_forms(vector, forms)
        for name in vector:
            held = kept(name, vector.change(name).touched())
            taken[name] = np.union1d(taken[name], held) if name in taken else held
    return taken


def check_forms(vector: TaskVector, forms: Mapping[str, Form]) -> None:
    """Raise MaskError, naming the tensor, if a vector does not fit the eligible tensors."""
    for name, spec in vector.specs.items():
        if name not in forms:
            raise MaskError(f"{vector.name} contains tensor {name!r}, which is not eligible here")
        if spec.shape != forms[name].shape:
            raise MaskError(f"tensor {name!r} is {list(spec.shape)} in {vector.name}, {list(forms[name].shape)} here")


def free_share(counts: Sequence[Mapping[str, int]], forms: Mapping[str, Form]) -> dict[str, float]:
    """Share of each tensor's weights that none of several masks contains.

    Args:
        counts: Of each of the disjoint masks, tensor name -> number of positions.
        forms: Tensor name -> Form of the eligible tensors.

    Returns:
        Tensor name -> share.
    """
    return {
        name: 1 - sum(count.get(name, 0) for count in counts) / form.size for name, form in forms.items() if form.size
    }
