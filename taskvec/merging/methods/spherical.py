"""Interpolation between the directions of task vectors: NuSLERP, Multi-SLERP, Model Stock.

Each tensor of a vector is one direction. The coefficients follow from the lengths of the tensors and the angles between
them, which are computed in f64 from the entries.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from taskvec_formats import SparseTensor

from ...errors import MergeError
from ...vectors.align import Aligned

Coefficients = npt.NDArray[np.float64]


def gram(vectors: Aligned) -> Coefficients:
    """The dot products of all pairs of tensors, f64 [n, n]."""
    held = [vectors.on_cpu(part).astype(np.float64) for part in vectors.parts]
    return np.array([[float(one @ other) for other in held] for one in held])


def combination(vectors: Aligned, coefficients: Coefficients) -> SparseTensor:
    """Σ cᵢ·τᵢ in f32, added in the order of the vectors."""
    total = vectors.zeros()
    for part, coefficient in zip(vectors.parts, coefficients, strict=True):
        total += vectors.values(part) * vectors.number(float(coefficient))
    return vectors.result(total)


def nuslerp(vectors: Aligned) -> SparseTensor:
    """Spherical interpolation of two vectors, at t = w₂ / (w₁ + w₂), or 0.5 if the weights add up to zero.

    The result is (sin((1 − t)θ)·τ₁ + sin(tθ)·τ₂) / sin θ, where θ is the angle between the tensors. If they have one
    direction, or opposite ones, it is (1 − t)·τ₁ + t·τ₂.
    Source: mergekit, merge_methods/nuslerp.py.

    Args:
        vectors: The two vectors in a whole tensor.
    """
    products = gram(vectors)
    one, two = (part.weight for part in vectors.parts)
    t = 0.5 if abs(one + two) < 1e-6 else two / (one + two)
    return combination(vectors, slerp_coefficients(t, products, same=lambda cosine: 1 - cosine**2 <= 1e-16))


def slerp_coefficients(t: float, products: Coefficients, *, same: Callable[[float], bool]) -> Coefficients:
    """The coefficients of two tensors in their spherical interpolation.

    Args:
        t: The position between the first (0) and the second (1).
        products: The dot products of the tensors, f64 [2, 2].
        same: Whether tensors with this cosine are interpolated linearly.

    Returns:
        f64 [2].
    """
    lengths = np.sqrt(np.diag(products))
    cosine = float(np.clip(products[0, 1] / (lengths[0] * lengths[1]), -1, 1)) if lengths.all() else 0.0
    if same(cosine):
        return np.array([1 - t, t])
    theta = np.arccos(cosine)
    found: Coefficients = np.sin(np.array([1 - t, t]) * theta) / np.sin(theta)
    return found


def multislerp(vectors: Aligned, *, normalize: bool = True) -> SparseTensor:
    """Barycentric interpolation on a sphere: a mean of directions, scaled to the weighted mean of the lengths.

    The directions uᵢ = τᵢ / |τᵢ| are projected to the tangent space at their normalized mean, averaged there with the
    weights, and projected back.
    Source: https://goddard.blog/posts/multislerp-wow-what-a-cool-idea.

    Args:
        vectors: The vectors in a whole tensor.
        normalize: Whether to divide the weights by their sum.

    Raises:
        MergeError: The weighted directions of more than two vectors add up to zero, or the weights do.
    """
    weights = np.array([part.weight for part in vectors.parts], np.float64)
    if normalize:
        if abs(weights.sum()) < 1e-8:
            raise MergeError("the weights add up to 0, so they cannot be divided by their sum")
        weights = weights / weights.sum()
    return combination(vectors, multislerp_coefficients(gram(vectors), weights))


def multislerp_coefficients(products: Coefficients, weights: Coefficients, epsilon: float = 1e-8) -> Coefficients:
    """The coefficients of the tensors in their barycentric interpolation.

    Args:
        products: The dot products of the tensors, f64 [n, n].
        weights: f64 [n].
        epsilon: A number that is added to lengths before they divide.

    Returns:
        f64 [n].

    Raises:
        MergeError: As in `multislerp`.
    """
    if len(weights) == 1:
        return np.ones(1)
    lengths = np.sqrt(np.diag(products))
    inverse = 1 / (lengths + epsilon)
    cosines = products * inverse[:, None] * inverse
    length = np.sqrt(max(float(weights @ cosines @ weights), 0.0))
    if length < epsilon:
        if len(weights) == 2:
            return weights
        raise MergeError("the weighted directions of the vectors add up to zero: change the weights")
    mean = weights / length  # coefficients of the directions
    along = cosines @ mean
    tangent = weights - (weights @ along) * mean
    size = np.sqrt(max(float(tangent @ cosines @ tangent), 0.0)) + epsilon
    found: Coefficients = (mean * np.cos(size) + tangent * (np.sin(size) / size)) * (lengths @ weights) * inverse
    return found


def model_stock(vectors: Aligned) -> SparseTensor:
    """The mean of the vectors, scaled by how much their directions agree.

    The result is t · Σ τᵢ / n with t = n·c / (1 + (n − 1)·c), where c is the mean cosine between the tensors of two
    vectors. If the denominator is zero, the tensor does not change.
    Source: Jang et al., "Model Stock", arXiv 2403.19522, section 4.

    Args:
        vectors: At least two vectors in a whole tensor. Their weights are not used.
    """
    count = len(vectors.parts)
    return combination(vectors, np.full(count, model_stock_share(gram(vectors)) / count))


def model_stock_share(products: Coefficients) -> float:
    """The factor t of the mean of n tensors in `model_stock`.

    Args:
        products: The dot products of the tensors, f64 [n, n].
    """
    lengths, count = np.sqrt(np.diag(products)), len(products)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    cosines = [np.clip(products[i, j] / (lengths[i] * lengths[j] or 1), -1, 1) for i, j in pairs]
    cosine = float(np.mean(cosines))
    divisor = 1 + (count - 1) * cosine
    return 0.0 if abs(divisor) < 1e-6 else count * cosine / divisor
