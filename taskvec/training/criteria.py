"""Criteria that choose the mask of a ticket: one row each, which says what the criterion needs and how it scores.

The rows are the values of the option `mask`. The mask contains the k weights with the largest scores. A score is never
selected if it is zero; of equal scores, the first positions are selected (`vectors.topk`).

Scores that need gradients sum them up over the steps of calibration, which changes the weights meanwhile. The gradient
of a step is that of the mean loss of its examples, before it is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import MaskError
from ..vectors.topk import FloatArray

# what a criterion may need of each weight, as an array in f32 (f64 for the weights of F64 tensors)
WEIGHTS = "weights"  # the weights at the start, from disk
CHANGES = "changes"  # what calibration changed
GRADIENTS = "gradients"  # the sums of the gradients of calibration
SQUARES = "squares"  # the sums of the squared gradients of calibration

_EPSILON = np.float32(1e-8)
_MAGNITUDE, _INFINITY = np.uint32(0x7FFF_FFFF), np.uint32(0x7F80_0000)  # bits of f32


@dataclass(frozen=True)
class Criterion:
    """A criterion.

    Attributes:
        name: The value of the option `mask`.
        mask: Which weights the mask contains, as a formula in words. w are the weights at the start, g the gradients of
            the steps of calibration. Names of options are in backticks.
        source: Where the criterion is from: the number on arXiv and the part of the paper, and the name of the method.
        needs: What `score` takes as keyword arguments: WEIGHTS, and one of CHANGES, GRADIENTS and SQUARES. If it is
            empty, the mask is drawn at random.
        score: Returns the scores of a tensor, f32 [size], as a new array. None if the mask is drawn.
        options: Names of further fields of TrainingOptions that `score` takes as keyword arguments.
        whole: Whether the score of a weight depends on others of its tensor. `score` then takes the weights of the
            whole tensor in its shape, and `kept`, a dict in which it can keep what it computes for a tensor.
        memory: Of a criterion with `whole`: takes the shape of a tensor and `options`, and returns the bytes that are
            kept for it until the mask is chosen, and the bytes that scoring it takes meanwhile.
    """

    name: str
    mask: str
    source: str
    needs: tuple[str, ...]
    score: Callable[..., FloatArray] | None
    options: tuple[str, ...] = ()
    whole: bool = False
    memory: Callable[..., tuple[int, int]] | None = None

    @property
    def observes(self) -> str | None:
        """What calibration has to observe: CHANGES, GRADIENTS or SQUARES; None without calibration."""
        return next((need for need in self.needs if need != WEIGHTS), None)

    @property
    def calibrates(self) -> bool:
        """Whether the criterion needs calibration."""
        return self.observes is not None

    @property
    def sums(self) -> bool:
        """Whether calibration stores a sum for each weight, in f32."""
        return self.observes in (GRADIENTS, SQUARES)

    @property
    def rate_power(self) -> float:
        """The p for which the best learning rate of a mask of density d is about that of full fine-tuning / d^p.

        Weights with large gradients need smaller steps (docs/paper.md has the measurements).
        """
        return 2 / 3 if self.sums else 1.0

    @property
    def weighs(self) -> bool:
        """Whether the criterion ranks by the weights alone."""
        return self.needs == (WEIGHTS,)

    @property
    def ranks(self) -> bool:
        """Whether the criterion ranks weights; if not, it draws positions by the seed."""
        return bool(self.needs)


def _largest_changes(*, changes: FloatArray) -> FloatArray:
    """|w_T − w|, the change in T steps of calibration (LoTA, arXiv 2406.16797, Algorithm 1)."""
    return np.abs(changes)


def _summed_gradients(*, gradients: FloatArray) -> FloatArray:
    """|Σ g| (SHiRA-Grad, arXiv 2406.13175). The paper takes the gradients at the weights of the base."""
    return np.abs(gradients)


def _summed_squares(*, squares: FloatArray) -> FloatArray:
    """Σ g², the empirical Fisher information (FISH mask, arXiv 2111.09839).

    The paper sums the squared gradients of single examples at the weights of the base; here they are those of steps.
    With `batch_size=1` and `accumulate=1` a step is an example.
    """
    return squares.copy()


def _gallop(*, weights: FloatArray, gradients: FloatArray) -> FloatArray:
    """|Σ g| / (|w| + 10⁻⁸), large gradients on small weights (GaLLoP, arXiv 2510.19778, selection of parameters).

    GaLLoP takes the mean of the gradients of examples at the weights of the base, and so does not train while it
    observes. A mean instead of a sum ranks the same. It ranks the weights of all layers together, as here.
    """
    return np.abs(gradients) / (np.abs(weights.astype(np.float32)) + _EPSILON)


def _saliency(*, weights: FloatArray, gradients: FloatArray) -> FloatArray:
    """|w · Σ g| (SNIP, arXiv 1810.02340; as a mask for fine-tuning "saliency" in SPEFT, arXiv 2412.13488).

    SPEFT takes the mean of the gradients of batches at the weights of the base, without training while it observes. A
    mean instead of a sum ranks the same.
    """
    return np.abs(weights.astype(np.float32) * gradients)


def _lift(*, weights: FloatArray, mask_rank: int, kept: dict[int, Any]) -> FloatArray:
    """|W_r|, where W_r is the best approximation of a weight matrix W of rank r = `mask_rank` (LIFT, arXiv 2506.00772).

    The "principal weights" of the paper. In its code, zihanghliu/LIFT, they are chosen again every 10 to 400 steps of
    training, from the weights at that time, and each matrix has as many as a LoRA adapter has weights. Here they are
    chosen once, from the weights at the start, and from all matrices together unless `scope=tensor` is given. The
    default of r is that of the code's documentation; its experiments use 32 to 128.

    Each matrix is approximated separately: a tensor with three axes has one matrix per index of the first axis. If r is
    at least the number of rows or of columns, W_r is W. The factors are exact, and the same whatever the number of
    threads (`models.low_rank`).

    Args:
        weights: f32 [..., m, n].
        mask_rank: r.
        kept: Number of a matrix -> its factors; those of a first call are used again.

    Raises:
        MaskError: A weight is not finite.
    """
    from ..models.low_rank import low_rank

    scores = weights.astype(np.float32)
    if not np.isfinite(scores).all():
        raise MaskError("`mask=lift` needs finite weights, found NaN or infinity")
    rows, columns = scores.shape[-2:]
    if mask_rank < min(rows, columns):
        matrices = scores.reshape(-1, rows, columns)
        for number, matrix in enumerate(matrices):
            if number not in kept:
                kept[number] = low_rank(matrix, mask_rank)
            matrices[number] = kept[number].product()
    return np.abs(scores.reshape(-1))


def _lift_memory(shape: tuple[int, ...], *, mask_rank: int) -> tuple[int, int]:
    """Bytes of the factors of a tensor's matrices, and of the arrays that computing them takes (`Criterion.memory`)."""
    short, long = sorted(shape[-2:])
    size = math.prod(shape)
    arrays = 3 * 4 * size  # the weights as read, their approximations, and the magnitudes of these
    if mask_rank >= short:
        return 0, arrays
    # in f64: the matrix times its transpose, its eigenvectors and their workspace; the longer factor, twice
    return 4 * mask_rank * (short + long) * (size // (short * long)), arrays + 8 * (4 * short**2 + 2 * mask_rank * long)


def _lowest_magnitudes(*, weights: FloatArray) -> FloatArray:
    """The weights of smallest magnitude: reinforcement learning moves them most (arXiv 2511.08567).

    The paper compares the weights that reinforcement learning changes with masks of the smallest |w|, and does not
    train such masks by other methods. The score is the f32 whose bits are those of infinity minus those of |w|. That is
    exactly the reverse order of the magnitudes, equal for equal ones: the score of 0.0 and −0.0 is infinite, and that
    of the largest finite weight is above zero. Weights that are infinite or not a number have the score 0.
    """
    bits = weights.astype(np.float32).view(np.uint32) & _MAGNITUDE
    found: FloatArray = (_INFINITY - np.minimum(bits, _INFINITY)).view(np.float32)
    return found


_ROWS = (
    Criterion(
        "magnitude",
        "the k largest changes of calibration |w_T − w|",
        "LoTA, arXiv 2406.16797, Algorithm 1",
        (CHANGES,),
        _largest_changes,
    ),
    Criterion("gradient", "the k largest |Σ g|", "SHiRA, arXiv 2406.13175", (GRADIENTS,), _summed_gradients),
    Criterion("fisher", "the k largest Σ g²", "FISH mask, arXiv 2111.09839", (SQUARES,), _summed_squares),
    Criterion(
        "gallop",
        "the k largest |Σ g| / (|w| + 10⁻⁸)",
        "GaLLoP, arXiv 2510.19778",
        (WEIGHTS, GRADIENTS),
        _gallop,
    ),
    Criterion(
        "saliency", "the k largest |w · Σ g|", "SNIP in SPEFT, arXiv 2412.13488", (WEIGHTS, GRADIENTS), _saliency
    ),
    Criterion(
        "lift",
        "the k largest |W_r|, where W_r is the best approximation of a weight matrix of rank r, `mask_rank`",
        "LIFT, arXiv 2506.00772",
        (WEIGHTS,),
        _lift,
        options=("mask_rank",),
        whole=True,
        memory=_lift_memory,
    ),
    Criterion("low-magnitude", "the k smallest |w|", "arXiv 2511.08567", (WEIGHTS,), _lowest_magnitudes),
    Criterion("random", "k positions drawn uniformly by `seed`", "a baseline for comparison", (), None),
)
CRITERIA = {row.name: row for row in _ROWS}
MASKS = tuple(CRITERIA)
