"""Methods on whole models that interpolate directions: SLERP, NuSLERP, Multi-SLERP, the Karcher mean, Model Stock.

The order of the operations is that of mergekit 0.1.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ...errors import MergeError, UsageError
from .engine import Function, Group, Values, WholeTensor, rounded


def _f32(number: Any) -> Any:
    return np.asarray(number, np.float32)


_DOT = 1 << 20  # values that are converted to f64 at once


def _dot(one: Values, other: Values) -> float:
    parts = [slice(low, low + _DOT) for low in range(0, len(one), _DOT)]
    return float(sum(float(one[part].astype(np.float64) @ other[part].astype(np.float64)) for part in parts))


# SLERP, https://en.wikipedia.org/wiki/Slerp


def _slerp_pair(group: Group) -> tuple[Values, Values]:
    assert group.base is not None
    return group.inputs[group.base], group.inputs[group.others[0]]


def _slerp_coefficients(tensor: WholeTensor) -> tuple[Any, Any]:
    """The coefficients of the base and of the other model, f32."""
    squares = tensor.total(lambda group: np.array([_dot(each, each) for each in _slerp_pair(group)]))
    lengths = np.where(_f32(np.sqrt(squares)) > 1e-8, _f32(np.sqrt(squares)), np.float32(1))

    def product(group: Group) -> float:
        one, other = (values / length for values, length in zip(_slerp_pair(group), lengths, strict=True))
        return float((one * other).sum(dtype=np.float64))

    t = np.float32(tensor.numbers["t"])
    cosine = np.clip(np.float32(tensor.total(product)), np.float32(-1), np.float32(1))
    if abs(cosine) > 0.9995:
        return np.float32(1) - t, t
    theta = np.float32(np.arccos(np.float64(cosine)))
    sines = [np.float32(np.sin(np.float64(angle))) for angle in ((np.float32(1) - t) * theta, t * theta, theta)]
    return sines[0] / sines[2], sines[1] / sines[2]


def _slerp(group: Group, coefficients: tuple[Any, Any]) -> Values:
    base, other = _slerp_pair(group)
    found: Values = coefficients[0] * base + coefficients[1] * other
    return found


# NuSLERP: SLERP of task vectors, or of models, over tensors, rows or columns


@dataclass(frozen=True)
class _Axis:
    """Sums over a whole tensor, or over each of its columns.

    Attributes:
        shape: (values of a range of the tensor) -> the same values as an array in which `axis` exists.
        axis: The axis of the sum. None for the sum of all values.
    """

    shape: Callable[[Values], Values]
    axis: int | None

    def sums(self, tensor: WholeTensor, of: Callable[[Group], Values]) -> Any:
        """The sums over each direction, f64: one number, or an array for columns."""
        return tensor.total(lambda group: self.shape(of(group)).sum(axis=self.axis, dtype=np.float64))


def _direction(tensor: WholeTensor) -> str:
    numbers = tensor.numbers
    if numbers["nuslerp_flatten"] or len(tensor.form.shape) < 2:
        return "tensor"
    if not numbers["nuslerp_row_wise"]:
        return "row"
    if len(tensor.form.shape) > 2:
        raise UsageError(f"tensor {tensor.name!r} has more than two dimensions: nuslerp_row_wise needs a matrix")
    return "column"


def _nuslerp_measured(tensor: WholeTensor) -> tuple[str, int, Any]:
    kind, row = _direction(tensor), tensor.row
    if kind == "row":
        return kind, row, None

    def shaped(values: Values) -> Values:
        return values.reshape(-1, row) if kind == "column" else values

    sums = _Axis(shaped, 0 if kind == "column" else None)
    lengths = [
        sums.sums(tensor, lambda group, i=i: group.deltas[i].astype(np.float64) ** 2)  # type: ignore[misc]
        for i in range(2)
    ]

    def product(group: Group) -> Values:
        units = [shaped(each) for each in group.deltas]
        units = [group.r(each / _length(group, length)) for each, length in zip(units, lengths, strict=True)]
        found: Values = group.r(units[0] * units[1]).reshape(-1)
        return found

    return kind, row, sums.sums(tensor, product)


def _length(group: Group, square: Any) -> Any:
    return np.maximum(group.r(np.sqrt(square)), group.r(1e-7))


def _nuslerp(group: Group, measured: tuple[str, int, Any]) -> Values:
    kind, row, cosines = measured
    one, other = group.deltas
    if kind != "tensor":
        one, other = one.reshape(-1, row), other.reshape(-1, row)
    if kind == "row":
        units = [
            group.r(each / _length(group, (each.astype(np.float64) ** 2).sum(axis=1, keepdims=True)))
            for each in (one, other)
        ]
        cosines = group.r(units[0] * units[1]).sum(axis=1, keepdims=True, dtype=np.float64)
    weights = [group.numbers["weight"][i] for i in group.others]
    t = 0.5 if abs(sum(weights)) < 1e-6 else weights[1] / sum(weights)
    cosine = np.clip(group.r(cosines), -1, 1)
    straight = group.r(1 - group.r(cosine * cosine)) <= 1e-16
    theta = group.r(np.arccos(np.where(straight, 0, cosine).astype(np.float64)))
    sines = [group.r(np.sin(group.r(theta * np.float32(share)).astype(np.float64))) for share in (1 - t, t)]
    curved = group.r(
        group.r(group.r(sines[0] * one) + group.r(sines[1] * other)) / group.r(np.sin(theta.astype(np.float64)))
    )
    line = group.r(group.r(one * np.float32(1 - t)) + group.r(other * np.float32(t)))
    return group.on_base(np.where(straight, line, curved).reshape(-1))


# Multi-SLERP, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea


class _Sphere:
    """The numbers that Multi-SLERP needs of a whole tensor."""

    def __init__(self, tensor: WholeTensor) -> None:
        self._eps = float(tensor.numbers["eps"])
        first = next(tensor.groups(), None)
        if first is None:
            return
        r, count = first.r, len(first.deltas)
        weights = r([tensor.numbers["weight"][i] for i in first.others])
        if tensor.numbers["normalize_weights"]:
            total = r(weights.sum(dtype=np.float64))
            if total == 0:
                raise MergeError("the weights add up to 0, so they cannot be divided by their sum")
            weights = r(weights / total)
        self.weights = weights
        self.single = count == 1
        if self.single:
            return
        self.lengths = r(np.sqrt(tensor.total(lambda group: np.array([_dot(each, each) for each in group.deltas]))))
        self.mean_length = r(np.sqrt(tensor.total(lambda group: _dot(self._raw_mean(group), self._raw_mean(group)))))
        self.straight = bool(self.mean_length < self._eps)
        if self.straight and count != 2:
            raise MergeError("the weighted directions of the models add up to zero: change the weights")
        if self.straight:
            return
        self.dots = r(tensor.total(self._products))
        size = r(np.sqrt(tensor.total(lambda group: _dot(self.tangent(group), self.tangent(group)))))
        size = r(size + np.float32(self._eps))
        self.factors = r(np.cos(float(size))), r(r(np.sin(float(size))) / size)
        self.length = r(r(self.lengths * weights).sum(dtype=np.float64))

    def units(self, group: Group) -> list[Values]:
        return [
            group.r(each / group.r(length + np.float32(self._eps)))
            for each, length in zip(group.deltas, self.lengths, strict=True)
        ]

    def _weighted(self, group: Group, parts: list[Values]) -> Values:
        products = [group.r(part * weight) for part, weight in zip(parts, self.weights, strict=True)]
        found: Values = group.r(np.sum(products, axis=0, dtype=np.float32))
        return found

    def _raw_mean(self, group: Group) -> Values:
        return self._weighted(group, self.units(group))

    def mean(self, group: Group) -> Values:
        found: Values = group.r(self._raw_mean(group) / self.mean_length)
        return found

    def _products(self, group: Group) -> Values:
        mean = self.mean(group)
        return np.array([group.r(unit * mean).sum(dtype=np.float64) for unit in self.units(group)])

    def tangent(self, group: Group) -> Values:
        mean = self.mean(group)
        parts = [group.r(unit - group.r(dot * mean)) for unit, dot in zip(self.units(group), self.dots, strict=True)]
        return self._weighted(group, parts)


def _multislerp(group: Group, sphere: _Sphere) -> Values:
    if sphere.single:
        return group.inputs[group.others[0]]
    if sphere.straight:
        parts = [group.r(delta * weight) for delta, weight in zip(group.deltas, sphere.weights, strict=True)]
        return group.on_base(group.r(parts[0] + parts[1]))
    along, across = sphere.factors
    found = group.r(group.r(sphere.mean(group) * along) + group.r(sphere.tangent(group) * across))
    return group.on_base(group.r(found * sphere.length))


# Model Stock, Jang et al., arXiv 2403.19522, section 4


def _stock_share(group: Group, offsets: list[Values], lengths: Any, products: Any) -> Any:
    """The factor t, from the lengths [n, ...] and the dot products [pairs, ...] of the offsets."""
    r, count = group.r, len(offsets)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    cosines = [
        np.clip(r(r(products[p]) / np.maximum(r(lengths[i] * lengths[j]), r(1e-6))), -1, 1)
        for p, (i, j) in enumerate(pairs)
    ]
    cosine = r(np.mean(cosines, axis=0, dtype=np.float64))
    divisor = r(1 + r(cosine * np.float32(count - 1)))
    flat = abs(divisor) < 1e-6
    return np.where(flat, 0, r(r(cosine * np.float32(count)) / np.where(flat, 1, divisor)))


def _stock_measured(tensor: WholeTensor) -> tuple[int | None, Any]:
    if tensor.numbers["filter_wise"] and len(tensor.form.shape) > 1:
        return tensor.row, None
    first = next(tensor.groups(), None)
    if first is None:
        return None, 0.0

    def sums(group: Group) -> Any:
        parts, count = group.deltas, len(group.deltas)
        squares = [_dot(part, part) for part in parts]
        products = [
            float(group.r(parts[i] * parts[j]).sum(dtype=np.float64)) for i in range(count) for j in range(i + 1, count)
        ]
        return np.array([*squares, *products])

    found, count = tensor.total(sums), len(first.deltas)
    return None, _stock_share(first, first.deltas, first.r(np.sqrt(found[:count])), found[count:])


def _model_stock(group: Group, measured: tuple[int | None, Any]) -> Values:
    assert group.base is not None
    row, t = measured
    base, parts = group.inputs[group.base], [group.inputs[i] for i in group.others]
    if row is not None:
        base, parts = base.reshape(-1, row), [part.reshape(-1, row) for part in parts]
        offsets = [delta.reshape(-1, row) for delta in group.deltas]
        lengths = [group.r(np.sqrt((each.astype(np.float64) ** 2).sum(axis=1, keepdims=True))) for each in offsets]
        products = [
            group.r(offsets[i] * offsets[j]).sum(axis=1, keepdims=True, dtype=np.float64)
            for i in range(len(offsets))
            for j in range(i + 1, len(offsets))
        ]
        t = _stock_share(group, offsets, lengths, products)
    total = parts[0]
    for part in parts[1:]:
        total = group.r(total + part)
    average = group.r(total / np.float32(len(parts)))
    found: Values = group.r(group.r(t * average) + group.r(group.r(1 - t) * base)).reshape(-1)
    return found


# Karcher mean, arXiv 2603.04972


def _karcher_mean(tensor: WholeTensor) -> Values:
    """The mean of whole tensors on the sphere, scaled to the mean of their lengths. It is computed at once."""
    inputs, tolerance = tensor.group(0, tensor.form.size).inputs, float(tensor.numbers["tol"])
    r, count = partial(rounded, tensor.form.dtype), len(inputs)
    if count == 1 or not tensor.form.size:
        return inputs[0]
    lengths = [_f32(np.sqrt(_dot(each, each))) for each in inputs]
    units = [r(each / length) for each, length in zip(inputs, lengths, strict=True) if float(length) > tolerance]
    if not units:
        return np.zeros_like(inputs[0])
    del inputs
    share = np.float32(1 / len(units))
    mean = np.zeros_like(units[0])
    for unit in units:
        mean = r(mean + r(unit * share))
    length = _f32(np.sqrt(_dot(mean, mean)))
    mean = units[0] if float(length) < tolerance else r(mean / length)
    for _ in range(int(tensor.numbers["max_iter"])):
        tangent = np.zeros_like(mean)
        for unit in units:
            dot = np.clip(r(_dot(mean, unit)), -1, 1)
            theta = r(np.arccos(float(dot)))
            if float(theta) < tolerance:
                continue
            scale = r(r(theta / r(np.sin(float(theta)))) * share)
            tangent = r(tangent + r(r(unit - r(mean * dot)) * scale))
        size = _f32(np.sqrt(_dot(tangent, tangent)))
        if float(size) < tolerance:
            break
        # torch rounds a number before a tensor to the dtype of the tensor, but not one after it
        cosine, sine = r(_f32(np.cos(float(size)))), r(_f32(np.sin(float(size))))
        mean = r(r(mean * cosine) + r(r(tangent / size) * sine))
        length = _f32(np.sqrt(_dot(mean, mean)))
        if float(length) > tolerance:
            mean = r(mean / length)
    scale = np.float32(0)
    for length in lengths:
        scale = scale + length * np.float32(1 / count)
    found: Values = r(mean * r(scale))
    return found


def _part(group: Group, mean: Values) -> Values:
    return mean[group.start : group.start + len(group.inputs[0])]


SLERP = Function(_slerp, _slerp_coefficients)
NUSLERP = Function(_nuslerp, _nuslerp_measured, by_block=True)
MULTISLERP = Function(_multislerp, _Sphere)
MODEL_STOCK = Function(_model_stock, _stock_measured, by_block=True)
KARCHER = Function(_part, _karcher_mean, is_large=True)
